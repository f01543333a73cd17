"""The CUDA program of one instantiation of a kernel, as MLX would write it."""

import numpy as np

from vllm_metal.metal_kernel_backend import kernel_library as library
from vllm_metal.metal_kernel_backend.kernel_library import Kernel

TYPES = {
    np.dtype(np.float16): "__half",
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.uint32): "unsigned int",
    np.dtype(np.uint16): "unsigned short",
}

INCLUDES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


def cuda_program(
    kernel: Kernel, template, dtypes, name: str, resident: tuple[int, int] | None = None
) -> str:
    """Its text; `dtypes` are those of inputs and outputs."""
    names = kernel.input_names + kernel.output_names
    parameters = ", ".join(
        f"{'const ' if i < len(kernel.input_names) else ''}{TYPES[np.dtype(dtype)]}* {buffer}"
        for i, (buffer, dtype) in enumerate(zip(names, dtypes, strict=True))
    )
    constants = "".join(f"  constexpr int {key} = {int(value)};\n" for key, value in template)
    return (
        f"{INCLUDES}{library.cuda_library(kernel, resident)}"
        f'extern "C" __global__ void {name}({parameters}) {{\n'
        f"{constants}{library.cuda_body(kernel)}}}\n"
    )
