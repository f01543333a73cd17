"""Kernels on the CPU: the file that GPUs run, compiled by a C++ compiler with shims/metal_host.h.

For tests and for `vllm-metal doctor` on machines without a GPU. One threadgroup runs at a time and
each of its threads is a fibre, so that simdgroup functions and barriers mean what they mean on a
GPU. It is never chosen by itself: plain MLX operations serve faster.

A kernel runs while its launch is built, and not, as on a GPU, when MLX evaluates what the launch
returned. So this target cannot show a mistake in the order of a write and a read; the tests'
`LazyTarget` runs the same programs when a GPU would.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from vllm_metal.machine.cache_folder import cache_folder
from vllm_metal.metal_kernel_backend.kernel_library import (
    Kernel,
    Run,
    Target,
    Template,
    declare_threadgroup,
    library_text,
    shim_source,
    without_includes,
)


@dataclass(frozen=True)
class HostProgram:
    """One instantiation of a kernel: what decides the text that is compiled."""

    kernel: Kernel
    template: tuple[tuple[str, int | mx.Dtype], ...]
    input_dtypes: tuple[mx.Dtype, ...]
    output_dtypes: tuple[mx.Dtype, ...]

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Template,
        output_dtypes: Sequence[mx.Dtype],
    ) -> "HostProgram":
        """The program of a launch."""
        dtypes = tuple(array.dtype for array in inputs)
        return cls(kernel, tuple(template), dtypes, tuple(output_dtypes))


class HostTarget(Target):
    """The CPU, one threadgroup at a time. Inputs are evaluated and outputs are ready on return.

    Raises RuntimeError where there is no C++ compiler, where compilation fails, or where a
    simdgroup function or a barrier is reached by only some of its threads.
    """

    name = "host"

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
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
                _unwritten(tuple(shape), _numpy_type(dtype))
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            launch = compiled(HostProgram.of(kernel, inputs, template, output_dtypes))
            views = [_numpy_view(array) for array in inputs] + outputs
            buffers = (ctypes.c_void_p * len(views))(*(view.ctypes.data for view in views))
            counts = (threads // each for threads, each in zip(grid, threadgroup, strict=True))
            threadgroups = (ctypes.c_uint * 3)(*counts)
            if launch(buffers, threadgroups, threadgroup[0]):
                raise RuntimeError(
                    f"kernel {kernel.name}: a simdgroup function or a barrier was reached by only "
                    "some of its threads"
                )
            return [
                mx.array(output).view(dtype) if dtype == mx.bfloat16 else mx.array(output)
                for output, dtype in zip(outputs, output_dtypes, strict=True)
            ]

        return run


class ProgramRecorder(Target):
    """Notes the programs that the host target would compile; every output is zeros."""

    name = "host"

    def __init__(self):
        self.programs: list[HostProgram] = []

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        def run(
            inputs: Sequence[mx.array],
            template: Template,
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            self.programs.append(HostProgram.of(kernel, inputs, template, output_dtypes))
            return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes, strict=True)]

        return run


HOST_TYPES = {
    mx.float16: "half",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.uint16: "ushort",
    mx.uint8: "uchar",
}

HOST_PROGRAM = """{shim}
namespace metal {{

{library}
static void metal_host_body(void* arguments, uint3 position, uint thread_index) {{
  void* const* buffers = static_cast<void* const*>(arguments);
  const uint3 threadgroup_position_in_grid = position;
  const uint simdgroup_index_in_threadgroup = thread_index / 32;
  const uint thread_index_in_simdgroup = thread_index % 32;
{declarations}
{body}
}}

extern "C" __attribute__((visibility("default"))) int launch(
    void* const* buffers, const uint* threadgroups, uint threads) {{
  return host::run_grid(threadgroups, threads, metal_host_body, const_cast<void**>(buffers));
}}

}} // namespace metal
"""

COMPILE_FLAGS = (
    "-std=c++14 -O1 -shared -fPIC -ffp-contract=off -fvisibility=hidden -fno-strict-aliasing -w "
    "-x c++ -"
).split()
"""For every compiler and system. The program is read from standard input."""


def host_source(program: HostProgram) -> str:
    """The C++ text of one instantiation."""
    kernel, declarations = program.kernel, []
    for name, value in program.template:
        if isinstance(value, mx.Dtype):
            declarations.append(f"  using {name} = {HOST_TYPES[value]};")
        else:
            declarations.append(f"  constexpr int {name} = {int(value)};")
    names = kernel.input_names + kernel.output_names
    dtypes = program.input_dtypes + program.output_dtypes
    for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
        const = "const " if i < len(kernel.input_names) else ""
        kind = f"{const}{HOST_TYPES[dtype]}*"
        declarations.append(f"  {kind} {name} = static_cast<{kind}>(buffers[{i}]);")
    return HOST_PROGRAM.format(
        shim=shim_source("metal_host.h"),
        library=without_includes(library_text(kernel)),
        declarations="\n".join(declarations),
        body=declare_threadgroup(kernel.body, "static thread_local"),
    )


_compilers = ThreadPoolExecutor(os.cpu_count() or 1, "host-kernels")


def compile_ahead(programs: Iterable[HostProgram]) -> None:
    """Begins to compile these programs, one on each core; `compiled` then finds them."""
    for program in programs:
        _compilation(program)


def compiled(program: HostProgram) -> Callable[..., int]:
    """The function `launch` of a program, compiled at its first use.

    Raises RuntimeError where there is no C++ compiler, and where the program does not compile.
    """
    return _compilation(program).result()


@cache
def _compilation(program: HostProgram) -> "Future[Callable[..., int]]":
    return _compilers.submit(_compile, program)


def _compile(program: HostProgram) -> Callable[..., int]:
    source, name = host_source(program), program.kernel.name
    native = ["-march=native"] if platform.machine() == "x86_64" else []
    command = [*host_compiler(), *native, *COMPILE_FLAGS]
    key = hashlib.sha256("\0".join([*command, platform.node(), source]).encode()).hexdigest()[:24]
    path = cache_folder() / "host-kernels" / f"{name}_{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            built = Path(file.name)
        result = subprocess.run(
            [*command, "-o", str(built)], input=source, text=True, capture_output=True
        )
        if result.returncode:
            built.unlink()
            raise RuntimeError(f"kernel {name} does not compile:\n{result.stderr[:4000]}")
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
        if name and (path := find_compiler(name)):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "the host target needs a C++ compiler; install g++ or clang "
            "(on a Mac: xcode-select --install)"
        ) from None
    return [sys.executable, "-m", "ziglang", "c++"]


def find_compiler(name: str) -> str | None:
    """The path of a compiler's command; None where there is none that compiles.

    Every Mac has the commands in /usr/bin. Without Apple's Command Line Tools they compile nothing
    and open a window that offers to install the tools; `xcode-select` tells without a window.
    """
    path = shutil.which(name)
    if path and platform.system() == "Darwin" and Path(path).parent == Path("/usr/bin"):
        command = ["/usr/bin/xcode-select", "--print-path"]
        tools = subprocess.run(command, capture_output=True, text=True)
        if tools.returncode or not Path(tools.stdout.strip()).is_dir():
            return None
    return path


def _unwritten(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An output before its kernel runs: NaN where it has floats, so that what the kernel leaves
    unwritten is seen when it is read."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)


def _numpy_type(dtype: mx.Dtype) -> type:
    names = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32}
    return names.get(dtype) or getattr(np, str(dtype).removeprefix("mlx.core."))


def _numpy_view(array: mx.array) -> np.ndarray:
    """The array's own memory: what a kernel writes through it, MLX sees."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.array(array, copy=False)
