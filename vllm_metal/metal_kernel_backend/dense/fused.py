"""Dense pages behind the attention boundary, on the kernels: nothing is gathered to decode."""

from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.dense.backend import DenseAttention
from vllm_metal.metal_kernel_backend.dense.kernels import DenseLauncher
from vllm_metal.metal_kernel_backend.dense.layout import MAX_DECODED_HEAD_SIZE, DenseLayout
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.paged.backend import KernelAttention
from vllm_metal.metal_kernel_backend.paged.constants_header import BLOCK_SIZE_STEP
from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants


@cache
def shared_launcher(layout: DenseLayout, target: Target) -> DenseLauncher:
    """One launcher for all layers of a layout."""
    return DenseLauncher(layout, target)


class DenseFused(KernelAttention, DenseAttention):
    """The kernels of `target`."""

    constants = LayerConstants()

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        dtype: mx.Dtype,
        target: Target,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, dtype, page_bytes)
        self.launcher = shared_launcher(self.layout, target)
        self.name += f" ({target.name} kernels)"
        self.plain_dtype = dtype


def obstacle(shape: LayerShape, block_size: int) -> str:
    """Why the kernels cannot serve a layer with dense pages; empty where they can."""
    if block_size % BLOCK_SIZE_STEP:
        return f"its blocks of {block_size} tokens are not a multiple of {BLOCK_SIZE_STEP}"
    if not shape.head_size_v:
        return "it caches one array instead of keys and values"
    if not shape.fetched and max(shape.head_size, shape.head_size_v) > MAX_DECODED_HEAD_SIZE:
        sizes = f"{shape.head_size} and {shape.head_size_v}"
        return f"its head sizes {sizes} are over {MAX_DECODED_HEAD_SIZE}"
    return ""
