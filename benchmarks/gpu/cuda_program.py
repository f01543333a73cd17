"""The CUDA programs of the kernels, as MLX would write them for what a launcher launches."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend import kernel_library as library
from vllm_metal.metal_kernel_backend.dense.kernels import DenseLauncher
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.kernel_library import Kernel, Run, Target
from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants as DenseConstants
from vllm_metal.metal_kernel_backend.paged.launcher import PageLauncher
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

TYPES = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "int32": "int",
    "uint32": "unsigned int",
    "uint16": "unsigned short",
}
"""By the name that MLX and NumPy give the type."""

INCLUDES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


@dataclass(frozen=True)
class Instantiation:
    """What a kernel is compiled for."""

    kernel: Kernel
    template: tuple[tuple[str, int | mx.Dtype], ...]
    dtypes: tuple[str, ...]
    """Names of the types of inputs and outputs."""
    resident: tuple[int, int] | None
    """Threads of a threadgroup, and threadgroups that a multiprocessor is to hold."""


def cuda_program(made_for: Instantiation, name: str) -> str:
    """The text of one kernel, with a C name."""
    kernel = made_for.kernel
    names = kernel.input_names + kernel.output_names
    buffers = ", ".join(
        f"{'const ' if i < len(kernel.input_names) else ''}{TYPES[dtype]}* {buffer}"
        for i, (buffer, dtype) in enumerate(zip(names, made_for.dtypes, strict=True))
    )
    constants = "".join(
        f"  using {key} = {TYPES[type_name(value)]};\n"
        if isinstance(value, mx.Dtype)
        else f"  constexpr int {key} = {int(value)};\n"
        for key, value in made_for.template
    )
    return (
        f"{INCLUDES}{library.cuda_library(kernel, made_for.resident)}"
        f'extern "C" __global__ void {name}({buffers}) {{\n'
        f"{constants}{library.cuda_body(kernel)}}}\n"
    )


class Recorder(Target):
    """A target that compiles and runs nothing; every output is zeros."""

    name = "cuda"

    def __init__(self):
        self.launched: list[Instantiation] = []

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        def run(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            dtypes = [array.dtype for array in inputs] + list(output_dtypes)
            self.launched.append(
                Instantiation(kernel, tuple(template), tuple(map(type_name, dtypes)), resident)
            )
            return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes, strict=True)]

        return run


Kind = Sequence[str] | mx.Dtype
"""Formats of keys and values, or the type of dense pages."""


def kind_name(kind: Kind) -> str:
    """`q8_0/q3_0`, `dense float16`."""
    return f"dense {type_name(kind)}" if isinstance(kind, mx.Dtype) else "/".join(kind)


def layout_of(
    kind: Kind, head_size: int = 128, kv_heads: int = 8, block_size: int = 16
) -> PageLayout | DenseLayout:
    """The layout of pages with keys and values of one size."""
    if not isinstance(kind, mx.Dtype):
        return PageLayout.of(*kind, head_size, kv_heads, block_size)
    page = 2 * block_size * kv_heads * head_size * kind.size
    return DenseLayout(kind, head_size, head_size, kv_heads, block_size, page)


def launcher_of(layout: PageLayout | DenseLayout, target: Target, **options) -> PageLauncher:
    """The launcher of a layout. `options` are its own."""
    kind = DenseLauncher if isinstance(layout, DenseLayout) else Launcher
    return kind(layout, target, **options)


def decode_instantiation(
    kind: Kind, heads_per_kv_head: int, head_size: int = 128, **options
) -> Instantiation:
    """Decode of one query token over pages of 8 KV heads and blocks of 16. Queries are float16, or
    of the type of dense pages; `options` are the launcher's."""
    layout, recorder = layout_of(kind, head_size), Recorder()
    launcher = launcher_of(layout, recorder, num_cores=132, **options)
    constants, factors = DenseConstants(), mx.zeros((8, head_size))
    page_dtype = query_dtype = kind
    if not isinstance(kind, mx.Dtype):
        page_dtype, query_dtype = mx.uint16, mx.float16
        constants = LayerConstants(factors, factors, factors, mx.zeros((head_size,)))
    launcher.decode(
        mx.zeros(layout.pages_shape(2), page_dtype),
        mx.zeros((1, 1, 8 * heads_per_kv_head, head_size), query_dtype),
        mx.zeros((1, 1), mx.int32),
        mx.zeros((1,), mx.int32),
        constants,
        1.0,
        16,
        launcher.no_token(),
    )
    return recorder.launched[0]


def type_name(dtype: mx.Dtype | np.dtype) -> str:
    if isinstance(dtype, mx.Dtype):
        return str(dtype).removeprefix("mlx.core.")
    return np.dtype(dtype).name
