"""Kernels in Metal's language, run by one of three targets.

    metal   mx.fast.metal_kernel, on Apple GPUs
    cuda    mx.fast.cuda_kernel, with shims/metal_cuda.h in front
    host    a C++ compiler and shims/metal_host.h: the same file on the CPU, for tests and for
            `vllm-metal doctor`; never chosen by itself, since it is not made for serving

A kernel is a file of functions (`kernels/*.metal`) and a short body that declares threadgroup
memory and calls one of them. The file's text goes through MLX as the kernel's header.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

SIMD_SIZE = 32
"""Threads of a simdgroup, on every target."""

Template = Sequence[tuple[str, int | bool | mx.Dtype]]
Run = Callable[..., list[mx.array]]
"""run(inputs, template, grid, threadgroup, output_shapes, output_dtypes), as MLX has it: `grid`
counts threads and is a multiple of `threadgroup`. Only the x axis of a threadgroup is used."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, before its template arguments are known."""

    name: str
    library: str
    """File name in `kernels/`, without `.metal`."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    body: str
    """MSL. Threadgroup arrays are declared here, each on a line that begins with `threadgroup`."""


class Target(ABC):
    """A way to run kernels."""

    name: str

    @abstractmethod
    def build(self, kernel: Kernel) -> Run:
        """The kernel, ready to be launched. Compilation happens at the first launch."""


class MetalTarget(Target):
    """Apple GPUs."""

    name = "metal"

    def build(self, kernel: Kernel) -> Run:
        return mx.fast.metal_kernel(
            name=_unique_name(kernel, ""),
            input_names=list(kernel.input_names),
            output_names=list(kernel.output_names),
            header=library_source(kernel.library),
            source=kernel.body,
        )


class CudaTarget(Target):
    """NVIDIA GPUs."""

    name = "cuda"

    def build(self, kernel: Kernel) -> Run:
        shim = shim_source("metal_cuda.h")
        return mx.fast.cuda_kernel(
            # MLX keeps compiled CUDA kernels by their names alone, on disk too.
            name=_unique_name(kernel, shim),
            input_names=list(kernel.input_names),
            output_names=list(kernel.output_names),
            header=shim + _without_includes(library_source(kernel.library)),
            source=CUDA_ATTRIBUTES + _declare_threadgroup(kernel.body, "__shared__"),
        )


CUDA_ATTRIBUTES = """
  const uint3 threadgroup_position_in_grid = {blockIdx.x, blockIdx.y, blockIdx.z};
  const uint simdgroup_index_in_threadgroup = threadIdx.x / 32;
  const uint thread_index_in_simdgroup = threadIdx.x % 32;
"""


class HostTarget(Target):
    """The CPU, one threadgroup at a time. Inputs are evaluated and outputs are ready on return.

    Raises RuntimeError where there is no C++ compiler, where compilation fails, or where a
    simdgroup function or a barrier is reached by only some of its threads.
    """

    name = "host"

    def build(self, kernel: Kernel) -> Run:
        def run(
            inputs: Sequence[mx.array],
            template: Template,
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            inputs = [mx.contiguous(array) for array in inputs]
            mx.eval(inputs)
            outputs = [
                np.empty(tuple(shape), _numpy_type(dtype))
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            dtypes = tuple(array.dtype for array in inputs)
            launch = _compiled(kernel, tuple(template), dtypes, tuple(output_dtypes))
            views = [_numpy_view(array) for array in inputs] + outputs
            buffers = (ctypes.c_void_p * len(views))(*(view.ctypes.data for view in views))
            groups = (ctypes.c_uint * 3)(*(g // t for g, t in zip(grid, threadgroup, strict=True)))
            if launch(buffers, groups, threadgroup[0]):
                raise RuntimeError(
                    f"kernel {kernel.name}: a simdgroup function or a barrier was reached by only "
                    "some of its threads"
                )
            return [
                mx.array(output).view(dtype) if dtype == mx.bfloat16 else mx.array(output)
                for output, dtype in zip(outputs, output_dtypes, strict=True)
            ]

        return run


def available_target() -> Target | None:
    """The target that serves on this machine: Metal, CUDA or none."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    if mx.metal.is_available():
        return MetalTarget()
    return CudaTarget()


@cache
def library_source(library: str) -> str:
    """The text of `kernels/<library>.metal`, from the installed package or the source tree."""
    here = Path(__file__).parents[1]
    folders = [here / "kernels", here.parent / "kernels"]
    for folder in folders:
        if (path := folder / f"{library}.metal").is_file():
            return path.read_text(encoding="ascii")
    raise FileNotFoundError(f"{library}.metal is in none of {[str(folder) for folder in folders]}")


@cache
def shim_source(name: str) -> str:
    """The text of a header in `shims/`."""
    return (Path(__file__).parent / "shims" / name).read_text(encoding="ascii")


def _unique_name(kernel: Kernel, shim: str) -> str:
    text = shim + library_source(kernel.library) + kernel.body
    return f"{kernel.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _without_includes(source: str) -> str:
    lines = source.splitlines(keepends=True)
    return "".join(x for x in lines if not x.startswith(("#include", "using namespace metal")))


def _declare_threadgroup(body: str, storage: str) -> str:
    return re.sub(r"^(\s*)threadgroup\b", rf"\1{storage}", body, flags=re.MULTILINE)


HOST_TYPES = {
    mx.float16: "half",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.uint16: "ushort",
    mx.uint8: "uchar",
}

HOST_ENTRY = """
static void metal_host_body(void* arguments, uint3 group, uint thread_index) {{
  void* const* buffers = static_cast<void* const*>(arguments);
  const uint3 threadgroup_position_in_grid = group;
  const uint simdgroup_index_in_threadgroup = thread_index / 32;
  const uint thread_index_in_simdgroup = thread_index % 32;
{declarations}
{body}
}}

extern "C" __attribute__((visibility("default"))) int launch(
    void* const* buffers, const uint* groups, uint threads) {{
  return host::run_grid(groups, threads, metal_host_body, const_cast<void**>(buffers));
}}
"""


def host_source(
    kernel: Kernel,
    template: Template,
    input_dtypes: Sequence[mx.Dtype],
    output_dtypes: Sequence[mx.Dtype],
) -> str:
    """The C++ program of one instantiation."""
    declarations = []
    for name, value in template:
        if isinstance(value, mx.Dtype):
            declarations.append(f"  using {name} = {HOST_TYPES[value]};")
        else:
            declarations.append(f"  constexpr int {name} = {int(value)};")
    names = kernel.input_names + kernel.output_names
    for i, (name, dtype) in enumerate(zip(names, (*input_dtypes, *output_dtypes), strict=True)):
        const = "const " if i < len(kernel.input_names) else ""
        kind = f"{const}{HOST_TYPES[dtype]}*"
        declarations.append(f"  {kind} {name} = static_cast<{kind}>(buffers[{i}]);")
    entry = HOST_ENTRY.format(
        declarations="\n".join(declarations),
        body=_declare_threadgroup(kernel.body, "static thread_local"),
    )
    library = _without_includes(library_source(kernel.library))
    return shim_source("metal_host.h") + library + entry


@cache
def _compiled(
    kernel: Kernel,
    template: tuple[tuple[str, int | mx.Dtype], ...],
    input_dtypes: tuple[mx.Dtype, ...],
    output_dtypes: tuple[mx.Dtype, ...],
) -> Callable[..., int]:
    source = host_source(kernel, template, input_dtypes, output_dtypes)
    command = [*host_compiler(), "-std=c++14", "-O2", "-shared", "-fPIC", "-ffp-contract=off"]
    command += ["-march=native"] if platform.machine() == "x86_64" else []
    command += ["-fvisibility=hidden", "-fno-strict-aliasing", "-w", "-x", "c++", "-"]
    key = hashlib.sha256("\0".join([*command, platform.node(), source]).encode()).hexdigest()[:24]
    path = cache_folder() / f"{kernel.name}_{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            built = Path(file.name)
        result = subprocess.run(
            [*command, "-o", str(built)], input=source, text=True, capture_output=True
        )
        if result.returncode:
            built.unlink()
            raise RuntimeError(f"kernel {kernel.name} does not compile:\n{result.stderr[:4000]}")
        built.replace(path)
    launch = ctypes.CDLL(str(path)).launch
    launch.restype = ctypes.c_int
    return launch


@cache
def host_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, one on the path, or the one in `ziglang`.

    Raises RuntimeError if there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise RuntimeError("the host target needs a C++ compiler; install g++ or clang") from None
    return [sys.executable, "-m", "ziglang", "c++"]


def cache_folder() -> Path:
    """Where compiled host kernels are kept: $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-metal" / "host-kernels"


def _numpy_type(dtype: mx.Dtype) -> type:
    names = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32}
    return names.get(dtype) or getattr(np, str(dtype).removeprefix("mlx.core."))


def _numpy_view(array: mx.array) -> np.ndarray:
    """The array's own memory: what a kernel writes through it, MLX sees."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.array(array, copy=False)
