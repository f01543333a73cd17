"""Dense pages: keys and values as they are, in float16, bfloat16 or float32.

A layer's pages are two arrays, keys `[num_blocks, H, block_size, Dk]` and values
`[num_blocks, H, block_size, Dv]`. Head-major blocks make one head's block a contiguous run, so a
request's context is gathered by whole rows straight into the layout attention wants.
"""

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape, Pages
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import (
    causal_attention,
    finite,
    head_blocks,
    score_workspace_bytes,
    valid_tokens,
)


class DensePages(AttentionBackend):
    """Unquantised paged attention on MLX operations.

    Args:
        shape: heads and head sizes of the layer.
        block_size: tokens of a block.
        dtype: element type of the pages; other K/V are cast on store.
    """

    def __init__(self, shape: LayerShape, block_size: int, dtype: mx.Dtype):
        super().__init__(shape, block_size)
        self.dtype = dtype
        self.name = f"dense {str(dtype).removeprefix('mlx.core.')}"

    @property
    def slot_size(self) -> int:
        return (self.shape.head_size + self.shape.head_size_v) * self.dtype.size

    def allocate(self, num_blocks: int) -> Pages:
        rows = (num_blocks, self.shape.num_kv_heads, self.block_size)
        return (
            mx.zeros((*rows, self.shape.head_size), self.dtype),
            mx.zeros((*rows, self.shape.head_size_v), self.dtype),
        )

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        rows = metadata.derived.once(("store_rows", self.shape.num_kv_heads), self._rows(metadata))
        keys, values = keys.astype(self.dtype), finite(values.astype(self.dtype))
        return tuple(
            _scatter_rows(page, rows, new) for page, new in zip(pages, (keys, values), strict=True)
        )

    def decode(
        self,
        pages: Pages,
        queries: mx.array,
        metadata: DecodeMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        keys, values = (part.astype(queries.dtype) for part in self.read(pages, metadata))
        mask = valid_tokens(metadata, self.block_size)
        return mx.fast.scaled_dot_product_attention(
            queries[:, :, None, :], keys, values, scale=scale, mask=mask, sinks=sinks
        )[:, :, 0, :]

    def prefill(
        self,
        pages: Pages,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        keys, values = self.fetch(pages, keys[None], values[None], metadata)
        return causal_attention(queries[None], keys, values, scale, sinks)[0]

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        return tuple(self._gather(page, metadata) for page in pages)

    def attention_workspace_bytes(self, context_len: int, query_len: int, num_heads: int) -> int:
        gathered = 2 * (context_len + query_len) * self.shape.num_kv_heads * self.slot_size
        return gathered + score_workspace_bytes(context_len + query_len, query_len, num_heads)

    def _rows(self, metadata: DecodeMetadata | PrefillMetadata):
        """Row of `[num_blocks * H * block_size]` for each token and head, [T, H]."""

        def rows() -> mx.array:
            slots = metadata.slot_mapping[:, None]
            heads = mx.arange(self.shape.num_kv_heads)[None, :]
            block, offset = slots // self.block_size, slots % self.block_size
            return (block * self.shape.num_kv_heads + heads) * self.block_size + offset

        return rows

    def _gather(
        self, page: mx.array, metadata: AttentionMetadata
    ) -> mx.array:  # [B, H, N * block_size, D]
        size = page.shape[-1]
        index = head_blocks(metadata, self.shape.num_kv_heads)
        batch, heads, blocks = index.shape
        if not size:
            return mx.zeros((batch, heads, blocks * self.block_size, 0), page.dtype)
        gathered = page.reshape(-1, self.block_size, size)[index]
        return gathered.reshape(batch, heads, blocks * self.block_size, size)


def _scatter_rows(page: mx.array, rows: mx.array, new: mx.array) -> mx.array:
    """Writes new [T, H, D] to rows [T, H] of a page array, in place where MLX may."""
    shape = page.shape
    if not page.size:
        return page
    page = page.reshape(-1, shape[-1])
    page[rows] = new
    return page.reshape(shape)
