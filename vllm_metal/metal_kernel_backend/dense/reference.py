"""Dense pages on MLX operations: what serves where there is no kernel target.

A request's context is gathered by whole runs straight into the layout that attention wants (see
`layout`). Runs and vectors are addressed in units that divide keys, values and pages alike.
"""

from dataclasses import dataclass
from math import gcd

import mlx.core as mx

from vllm_metal.attention.backend import Chunk, ChunkMemory, LayerShape, Pages, Rows
from vllm_metal.attention.broken_tokens import confined
from vllm_metal.attention.metadata import AttentionMetadata
from vllm_metal.attention.slots import split_slots
from vllm_metal.metal_kernel_backend.causal_attention import (
    causal_attention,
    causal_memory,
    valid_tokens,
)
from vllm_metal.metal_kernel_backend.dense.backend import DenseAttention


class DensePages(DenseAttention):
    """Unquantised paged attention on MLX operations.

    Args:
        shape: heads and head sizes of the layer.
        block_size: tokens of a block.
        dtype: element type of the pages; other K/V are cast on store.
        page_bytes: bytes of a page where it is longer than its keys and values.
        shared: whether a block may hold what layers of other kinds left there, any bytes at all.
    """

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        dtype: mx.Dtype,
        page_bytes: int = 0,
        shared: bool = False,
    ):
        super().__init__(shape, block_size, dtype, page_bytes)
        self._shared = shared
        self._geometry = _Geometry(
            shape.num_kv_heads,
            (shape.head_size, shape.head_size_v),
            block_size,
            self.page_size_bytes // dtype.size,
        )

    def store(
        self, pages: Pages, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> Pages:
        unit = self._geometry.unit(1)
        units = metadata.once(_token_units, self._geometry)
        # As the pages have them: what their type cannot hold is infinite.
        keys, values = confined(keys.astype(self.dtype), values.astype(self.dtype))
        tokens, new = keys.shape[0], keys.flatten(1)
        if self.shape.head_size_v:
            new = mx.concatenate([new, values.flatten(1)], axis=1)
        array = pages.array.reshape(-1, unit)
        array[units] = new.reshape(tokens, -1, unit)
        return Pages(array.reshape(pages.array.shape))

    def decode_part(self, pages: Pages, rows: Rows) -> mx.array:
        queries, metadata = rows.queries, rows.metadata
        keys, values = (part.astype(queries.dtype) for part in self.read(pages, metadata))
        mask = valid_tokens(metadata, self.block_size, self.shape.sliding_window)
        if self._shared:  # what another layer left may read as NaN, and 0 * NaN is NaN
            seen = mask.any(axis=2, keepdims=True)
            values = mx.where(seen.swapaxes(2, 3), values, 0)
        return mx.fast.scaled_dot_product_attention(
            queries.swapaxes(1, 2), keys, values, scale=rows.scale, mask=mask, sinks=rows.sinks
        ).swapaxes(1, 2)

    def prefill(self, pages: Pages, chunk: Chunk) -> mx.array:
        keys, values = self.fetch(pages, chunk.keys[None], chunk.values[None], chunk.metadata)
        window = self.shape.sliding_window
        return causal_attention(
            chunk.queries[None], keys, values, chunk.scale, chunk.sinks, window
        ).squeeze(0)

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        units = pages.array.reshape(-1, self._geometry.unit(self.block_size))
        keys, values = metadata.once(_block_units, self._geometry)
        batch, blocks = metadata.block_table.shape
        rows = batch, self.shape.num_kv_heads, blocks * self.block_size
        return (
            units[keys].reshape(*rows, self.shape.head_size),
            mx.zeros((*rows, 0), self.dtype)
            if values is None
            else units[values].reshape(*rows, self.shape.head_size_v),
        )

    def attended_memory(self, query_len: int, seq_len: int, num_heads: int) -> ChunkMemory:
        return causal_memory(query_len, seq_len, num_heads, self.shape.sliding_window)


@dataclass(frozen=True)
class _Geometry:
    """The numbers that addresses depend on; layers of equal geometry share index arrays."""

    num_kv_heads: int
    head_sizes: tuple[int, int]
    """Dk and Dv."""
    block_size: int
    page_elements: int
    """Elements from one page to the next."""

    def unit(self, tokens: int) -> int:
        """The largest run of elements that divides keys and values of `tokens` tokens, and pages.

        Runs of `tokens` tokens of one head are addressed in such units.
        """
        key_size, value_size = self.head_sizes
        return gcd(tokens * key_size, tokens * value_size, self.page_elements)


def _token_units(metadata: AttentionMetadata, geometry: _Geometry) -> mx.array:
    """Units that hold each new token's keys, head by head, and then its values: [T, R].

    A layer without values adds nothing, not even arrays without elements: see `_joined` in
    `attention/backend.py`.
    """
    unit, heads = geometry.unit(1), geometry.num_kv_heads
    block_ids, offsets = split_slots(metadata.slot_mapping[:, None], geometry.block_size)
    parts, begin = [], 0
    for size in filter(None, geometry.head_sizes):
        each = size // unit
        units = mx.arange(heads * each)[None, :]
        head = units // each
        parts.append(begin + (head * geometry.block_size + offsets) * each + units - head * each)
        begin += heads * geometry.block_size * each
    return block_ids * (geometry.page_elements // unit) + mx.concatenate(parts, axis=1)


def _block_units(
    metadata: AttentionMetadata, geometry: _Geometry
) -> tuple[mx.array, mx.array | None]:
    """Units of every block's keys, head by head, and of its values, if any: [B, H, N, R] each."""
    unit, heads = geometry.unit(geometry.block_size), geometry.num_kv_heads
    first = (metadata.block_table * (geometry.page_elements // unit))[:, None, :, None]
    keys, values = (geometry.block_size * size // unit for size in geometry.head_sizes)

    def units(begin: int, each: int) -> mx.array:
        return first + begin + mx.arange(heads * each).reshape(heads, 1, each)

    return units(0, keys), units(heads * keys, values) if values else None
