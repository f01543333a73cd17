"""Runs the CUDA text of the kernels through CuPy, so that CUDA graphs and sanitizers reach it.

The text, its compiler (NVRTC) and its bounds are those of `CudaTarget`; only the launch differs.
"""

import cupy as cp
import mlx.core as mx
import numpy as np
from cuda_program import Instantiation, cuda_program, type_name

from vllm_metal.metal_kernel_backend.kernel_library import Kernel, Run, Target


class CupyTarget(Target):
    """Inputs are CuPy arrays; those of the launcher's own may be MLX arrays."""

    name = "cuda"

    def __init__(self):
        self._constants = {}
        self._compiled = {}

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        def run(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            inputs = [self._on_gpu(array) for array in inputs]
            outputs = [
                cp.empty(shape, type_name(dtype))
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            dtypes = tuple(type_name(array.dtype) for array in (*inputs, *outputs))
            made_for = Instantiation(kernel, tuple(template), dtypes, resident)
            if made_for not in self._compiled:
                options = ("-std=c++17", "-I/usr/local/cuda/include")
                text = cuda_program(made_for, kernel.name)
                module = cp.RawModule(code=text, options=options, backend="nvrtc")
                self._compiled[made_for] = module.get_function(kernel.name)
            blocks = tuple(g // t for g, t in zip(grid, threadgroup, strict=True))
            self._compiled[made_for](blocks, threadgroup, (*inputs, *outputs))
            return outputs

        return run

    def _on_gpu(self, array):
        if not isinstance(array, mx.array):
            return array
        if id(array) not in self._constants:
            self._constants[id(array)] = (array, cp.asarray(np.array(array)))
        return self._constants[id(array)][1]
