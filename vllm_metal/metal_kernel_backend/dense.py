"""Dense pages: keys and values as they are, in float16, bfloat16 or float32.

A page is the keys `[H, block_size, Dk]` of a block and then its values `[H, block_size, Dv]`.
Head-major blocks make one head's block a contiguous run, so a request's context is gathered by
whole runs straight into the layout attention wants. Runs and vectors are addressed in units that
divide keys, values and pages alike.
"""

from math import gcd

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape, Pages, PrefillChunk
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import (
    causal_attention,
    causal_chunk,
    finite,
    valid_tokens,
)


class DensePages(AttentionBackend):
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
        super().__init__(shape, block_size, page_bytes)
        self.dtype = self.page_dtype = dtype
        self._shared = shared
        self.name = f"dense {str(dtype).removeprefix('mlx.core.')}"

    @property
    def slot_size(self) -> int:
        return (self.shape.head_size + self.shape.head_size_v) * self.dtype.size

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        unit = self._unit(1)
        rows = metadata.derived.once(("store_rows", self._geometry()), self._rows(metadata, unit))
        keys, values = keys.astype(self.dtype), finite(values.astype(self.dtype))
        tokens = keys.shape[0]
        new = mx.concatenate([keys.flatten(1), values.flatten(1)], axis=1)
        array = pages.array.reshape(-1, unit)
        array[rows] = new.reshape(tokens, -1, unit)
        return Pages(array.reshape(pages.array.shape))

    def decode(
        self,
        pages: Pages,
        queries: mx.array,
        metadata: DecodeMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        keys, values = (part.astype(queries.dtype) for part in self.read(pages, metadata))
        mask = valid_tokens(metadata, self.block_size, self.shape.sliding_window)
        if self._shared:
            values = mx.where(mask.swapaxes(2, 3), values, 0)  # 0 times a NaN is one, too
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
        window = self.shape.sliding_window
        return causal_attention(queries[None], keys, values, scale, sinks, window)[0]

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        unit = self._unit(self.block_size)
        units = pages.array.reshape(-1, unit)
        indices = metadata.derived.once(
            ("gathered_units", self._geometry()), self._head_units(metadata, unit)
        )
        batch, blocks = metadata.block_table.shape
        rows = batch, self.shape.num_kv_heads, blocks * self.block_size
        sizes = self.shape.head_size, self.shape.head_size_v
        return tuple(
            units[index].reshape(*rows, size) for index, size in zip(indices, sizes, strict=True)
        )

    def attended_chunk(self, query_len: int, seq_len: int, num_heads: int) -> PrefillChunk:
        return causal_chunk(query_len, seq_len, num_heads, self.shape.sliding_window)

    def _geometry(self) -> tuple[int, ...]:
        """What the addresses of tokens depend on, beside their slots."""
        shape = self.shape
        sizes = shape.num_kv_heads, shape.head_size, shape.head_size_v
        return *sizes, self.block_size, self.page_size_bytes

    def _unit(self, tokens: int) -> int:
        """Largest run of elements that divides keys and values of `tokens` tokens, and pages."""
        sizes = tokens * self.shape.head_size, tokens * self.shape.head_size_v
        return gcd(*sizes, self.page_size_bytes // self.dtype.size)

    def _rows(self, metadata: AttentionMetadata, unit: int):
        """Units that hold each token's keys, head by head, and then its values: [T, R]."""

        def rows() -> mx.array:
            slots = metadata.slot_mapping[:, None]
            block, token = slots // self.block_size, slots % self.block_size
            parts, begin = [], 0
            for size in (self.shape.head_size, self.shape.head_size_v):
                each = size // unit
                units = mx.arange(self.shape.num_kv_heads * each)[None, :]
                head = units // each if each else units
                parts.append(begin + (head * self.block_size + token) * each + units - head * each)
                begin += self.shape.num_kv_heads * self.block_size * each
            first = block * (self.page_size_bytes // (unit * self.dtype.size))
            return first + mx.concatenate(parts, axis=1)

        return rows

    def _head_units(self, metadata: AttentionMetadata, unit: int):
        """Units of every block's keys and values, head by head: two of [B, H, N, R]."""

        def units() -> tuple[mx.array, mx.array]:
            stride = self.page_size_bytes // (unit * self.dtype.size)
            first = (metadata.block_table * stride)[:, None, :, None]
            parts, begin = [], 0
            for size in (self.shape.head_size, self.shape.head_size_v):
                each = self.block_size * size // unit
                runs = mx.arange(self.shape.num_kv_heads * each)
                runs = runs.reshape(self.shape.num_kv_heads, 1, each)
                parts.append(first + begin + runs)
                begin += self.shape.num_kv_heads * each
            return tuple(parts)

        return units
