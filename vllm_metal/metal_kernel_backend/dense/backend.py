"""Dense pages behind the attention boundary: what every path shares.

`reference.DensePages` stores and attends on MLX operations, `fused.DenseFused` on the kernels.
"""

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout, dense_slot_size


class DenseAttention(AttentionBackend):
    """Unquantised paged attention.

    Args:
        shape: heads and head sizes of the layer.
        block_size: tokens of a block.
        dtype: element type of the pages; other K/V are cast on store.
        page_bytes: bytes of a page where it is longer than its keys and values.
    """

    def __init__(self, shape: LayerShape, block_size: int, dtype: mx.Dtype, page_bytes: int = 0):
        super().__init__(shape, block_size)
        self.dtype = self.page_dtype = dtype
        self.layout = DenseLayout(
            dtype,
            shape.head_size,
            shape.head_size_v,
            shape.num_kv_heads,
            block_size,
            page_bytes or block_size * shape.num_kv_heads * self.slot_size,
        )
        self.name = f"dense {str(dtype).removeprefix('mlx.core.')}"

    @property
    def slot_size(self) -> int:
        return dense_slot_size(self.shape, self.dtype)

    @property
    def page_size_bytes(self) -> int:
        return self.layout.page_size_bytes
