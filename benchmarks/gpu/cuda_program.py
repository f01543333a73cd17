"""The CUDA programs of the kernels, as MLX would write them for what a launcher launches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend import kernel_library as library
from vllm_metal.metal_kernel_backend.kernel_library import Kernel, Run, Target
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

TYPES = {
    np.dtype(np.float16): "__half",
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.uint32): "unsigned int",
    np.dtype(np.uint16): "unsigned short",
}

INCLUDES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


@dataclass(frozen=True)
class Instantiation:
    """What a kernel is compiled for."""

    kernel: Kernel
    template: tuple[tuple[str, int], ...]
    dtypes: tuple[np.dtype, ...]
    """Of inputs and outputs."""
    resident: tuple[int, int] | None
    """Threads of a threadgroup, and threadgroups that a multiprocessor is to hold."""


def cuda_program(made_for: Instantiation, name: str) -> str:
    """The text of one kernel, with a C name."""
    kernel = made_for.kernel
    names = kernel.input_names + kernel.output_names
    buffers = ", ".join(
        f"{'const ' if i < len(kernel.input_names) else ''}{TYPES[np.dtype(dtype)]}* {buffer}"
        for i, (buffer, dtype) in enumerate(zip(names, made_for.dtypes, strict=True))
    )
    constants = "".join(
        f"  constexpr int {key} = {int(value)};\n" for key, value in made_for.template
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
                Instantiation(kernel, tuple(template), tuple(map(numpy_type, dtypes)), resident)
            )
            return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes, strict=True)]

        return run


def recorded(
    launch: Callable[[Launcher], object], layout: PageLayout, **options
) -> list[Instantiation]:
    """What `launch` makes a launcher compile. `options` are the launcher's."""
    recorder = Recorder()
    launch(Launcher(layout, recorder, num_cores=132, **options))
    return recorder.launched


def decode_instantiation(
    pair: Sequence[str], heads_per_kv_head: int, head_size: int = 128, **options
) -> Instantiation:
    """Decode of one float16 query token over pages of 8 KV heads and blocks of 16."""
    layout = PageLayout.of(*pair, head_size, 8, 16)

    def launch(launcher: Launcher) -> None:
        factors = mx.zeros((8, head_size))
        launcher.decode(
            mx.zeros(layout.pages_shape(2), mx.uint16),
            mx.zeros((1, 1, 8 * heads_per_kv_head, head_size), mx.float16),
            mx.zeros((1, 1), mx.int32),
            mx.zeros((1,), mx.int32),
            LayerConstants(factors, factors, factors, mx.zeros((head_size,))),
            1.0,
            16,
            launcher.no_token(),
        )

    return recorded(launch, layout, **options)[0]


def numpy_type(dtype: mx.Dtype | np.dtype) -> np.dtype:
    if isinstance(dtype, mx.Dtype):
        return np.dtype(str(dtype).removeprefix("mlx.core."))
    return np.dtype(dtype)
