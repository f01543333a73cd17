"""Kernels in Metal's language, run by one of three targets.

    metal   mx.fast.metal_kernel, on Apple GPUs
    cuda    mx.fast.cuda_kernel, with shims/metal_cuda.h in front
    host    host_target.py: the same file on the CPU, for tests and for `vllm-metal doctor`

A kernel is a header in `kernels/`, with what it includes, and a short body that declares
threadgroup memory and calls a function of the header. The expanded text goes through MLX as the
kernel's header. Its constants come from Python.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

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
    header: str
    """The file in `kernels/` with its function; empty: the body needs none."""
    constants: tuple[tuple[str, str], ...] = field(repr=False)
    """Headers that Python writes, and the text that stands where others include them."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    body: str
    """MSL. Threadgroup arrays are declared here, each on a line that begins with `threadgroup`."""
    large_inputs: tuple[str, ...] = ()
    """Inputs that may hold gigabytes, row by row, and of which a launch touches a small part."""

    def in_order(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The inputs in the order of `input_names`.

        Raises ValueError, with the names, where one is missing or superfluous.
        """
        if inputs.keys() != set(self.input_names):
            missing = [name for name in self.input_names if name not in inputs]
            superfluous = [name for name in inputs if name not in self.input_names]
            raise ValueError(
                f"kernel {self.name}: inputs missing: {missing}, superfluous: {superfluous}"
            )
        return [inputs[name] for name in self.input_names]


class Target(ABC):
    """A way to run kernels."""

    name: str

    @abstractmethod
    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        """The kernel, ready to be launched. Compilation happens at the first launch.

        `resident` is (threads of a threadgroup, threadgroups that a core must hold at a time): a
        bound on registers, where the target takes one.
        """


class MetalTarget(Target):
    """Apple GPUs."""

    name = "metal"

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        run: Any = mx.fast.metal_kernel(
            name=_unique_name(kernel, library_text(kernel)),
            input_names=list(kernel.input_names),
            output_names=list(kernel.output_names),
            header=library_text(kernel),
            source=kernel.body,
        )
        return _by_first_rows(kernel, run)


class CudaTarget(Target):
    """NVIDIA GPUs."""

    name = "cuda"

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        library = cuda_library(kernel, resident)
        run: Any = mx.fast.cuda_kernel(
            # MLX keeps compiled CUDA kernels by their names alone, on disk too.
            name=_unique_name(kernel, library),
            input_names=list(kernel.input_names),
            output_names=list(kernel.output_names),
            header=library,
            source=cuda_body(kernel),
        )
        return _by_first_rows(kernel, run)


def _by_first_rows(kernel: Kernel, run: Run) -> Run:
    """Binds the first row of each large input: it begins where the input does, in its buffer.

    MLX adds up the sizes of the arrays that operations bind, whether they are read or not, and
    sends what it has encoded to the GPU each time the sum passes some megabytes
    (`CommandEncoder::needs_commit` of its Metal and CUDA backends). A layer's pages alone would
    pass them in every launch.
    """
    if not kernel.large_inputs:
        return run

    def launch(inputs: Sequence[mx.array], **arguments: Any) -> list[mx.array]:
        rows = [
            array[:1] if name in kernel.large_inputs else array
            for name, array in zip(kernel.input_names, inputs, strict=True)
        ]
        return run(inputs=rows, **arguments)

    return launch


def cuda_library(kernel: Kernel, resident: tuple[int, int] | None) -> str:
    """What stands before the kernel."""
    text = compact(shim_source("metal_cuda.h")) + without_device(
        without_includes(library_text(kernel))
    )
    return text + CUDA_BOUNDS.format(*resident) if resident else text


def cuda_body(kernel: Kernel) -> str:
    """What stands inside it."""
    return CUDA_ATTRIBUTES + without_device(declare_threadgroup(kernel.body, "__shared__"))


CUDA_BOUNDS = """
#undef __global__
#define __global__ __location__(global) __launch_bounds__({}, {})
"""
"""MLX writes the kernel's declaration; this is the one way to a bound on its registers."""

CUDA_ATTRIBUTES = """
  const uint3 threadgroup_position_in_grid = {blockIdx.x, blockIdx.y, blockIdx.z};
  const uint simdgroup_index_in_threadgroup = threadIdx.x / 32;
  const uint thread_index_in_simdgroup = threadIdx.x % 32;
"""


def available_target() -> Target | None:
    """The target that serves on this machine: Metal, CUDA or none."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    if mx.metal.is_available():
        return MetalTarget()
    return CudaTarget()


KERNELS = Path(__file__).parents[1] / "kernels"
"""The folder of the kernels' sources: in the source tree a link to the one at its root."""


def expanded(header: str, constants: Mapping[str, str], seen: set[str] | None = None) -> str:
    """A header of `kernels/` with the headers it includes in their places, each once.

    The files of those in `constants` are for editors and Metal's own compiler; the text counts.

    Raises FileNotFoundError for a header that does not exist.
    """
    seen = set() if seen is None else seen
    if header in seen:
        return ""
    seen.add(header)
    source = constants[header] if header in constants else header_source(header)
    text = ""
    for line in source.splitlines(keepends=True):
        if line.startswith('#include "'):
            text += expanded(line.split('"')[1], constants, seen)
        elif not line.startswith("#pragma once"):
            text += line
    return text


@cache
def header_source(header: str) -> str:
    """The text of a file in `kernels/`."""
    return (KERNELS / header).read_text(encoding="ascii")


@cache
def shim_source(name: str) -> str:
    """The text of a header in `shims/`."""
    return (Path(__file__).parent / "shims" / name).read_text(encoding="ascii")


@cache
def library_text(kernel: Kernel) -> str:
    """What stands before a kernel's body: constants and functions, compact."""
    return compact(expanded(kernel.header, dict(kernel.constants))) if kernel.header else ""


def without_device(source: str) -> str:
    """For CUDA, where `device` cannot be a macro: `__device__` expands to a text that has it."""
    return re.sub(r"\bdevice ", "", source)


def _unique_name(kernel: Kernel, library: str) -> str:
    text = library + kernel.body
    return f"{kernel.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def compact(source: str) -> str:
    """Without comments and indentation: MLX copies and hashes the text at every launch."""
    lines = (line.split("//")[0].strip() for line in source.splitlines())
    return "".join(line + "\n" for line in lines if line)


def without_includes(source: str) -> str:
    """Without what only Metal's compiler has."""
    lines = source.splitlines(keepends=True)
    return "".join(x for x in lines if not x.startswith(("#include", "using namespace metal")))


def declare_threadgroup(body: str, storage: str) -> str:
    """A kernel's body with its threadgroup arrays declared in another way."""
    return re.sub(r"^(\s*)threadgroup\b", rf"\1{storage}", body, flags=re.MULTILINE)
