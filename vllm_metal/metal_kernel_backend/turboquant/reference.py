"""TurboQuant pages on MLX operations: what the kernels compute, in readable form.

This path serves wherever no kernel target exists. A store quantises, packs and scatters. A decode
step computes scores and outputs from the packed codes (`products`); a prefill chunk dequantises its
context and attends with MLX's own attention, in rotated coordinates.
"""

from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import Chunk, ChunkMemory, LayerShape, Pages, Rows
from vllm_metal.attention.metadata import AttentionMetadata, PrefillMetadata
from vllm_metal.attention.slots import split_slots
from vllm_metal.metal_kernel_backend.causal_attention import (
    causal_attention,
    causal_memory,
    softmax_with_sinks,
    valid_tokens,
)
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.codec import TokenCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.products import (
    PackedVectors,
    output_matrix,
    query_matrices,
)
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized
from vllm_metal.metal_kernel_backend.turboquant.slots import Slots


@cache
def shared_slots(layout: PageLayout) -> Slots:
    """One for all layers of a layout, so that they share index arrays."""
    return Slots(layout)


class TurboQuantReference(TurboQuantAttention):
    """The plain MLX path."""

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: FormatPair,
        constants: KeyConstants,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, formats, constants, reproducible, page_bytes)
        self._slots = shared_slots(self.layout)
        self._codec = TokenCodec(self.key_codec, self.value_codec)
        self._keys = PackedVectors(formats.key, shape.head_size)
        self._values = PackedVectors(formats.value, shape.head_size_v)
        self._query_matrices = query_matrices(constants.multiplier, self._keys)
        self._output_matrix = output_matrix(self._values, shape.head_size_v)

    def store(
        self, pages: Pages, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> Pages:
        packed = self._slots.pack(self._codec.quantize(keys, values))
        indices = metadata.once(_slot_indices, self._slots)
        return Pages(self._slots.store(pages.array, packed, indices))

    def decode_part(self, pages: Pages, rows: Rows) -> mx.array:
        metadata, sinks = rows.metadata, rows.sinks
        indices = metadata.once(_head_page_indices, self._slots)
        head_pages = self._slots.head_pages(pages.array, indices)
        scales = self._slots.scales_and_biases(head_pages)  # [B, H, 1, 1, S] each
        key_scales, *biases, value_scales = scales
        batch, query_len, num_heads, size = rows.queries.shape
        queries = rows.queries.astype(mx.float32).swapaxes(1, 2)
        queries = queries.reshape(batch, self.shape.num_kv_heads, -1, query_len, size)
        rotated = queries @ self._query_matrices  # [B, H, G, Q, L]
        keys = self._slots.key_halfwords(head_pages), self._slots.key_levels(head_pages)
        scores = self._keys.products(rotated, *keys) * key_scales
        if biases:
            total = mx.sum(rotated, axis=-1, keepdims=True) / self._keys.gain
            scores = scores + total * biases[0]
        if sinks is not None:  # compared with logits of keys that are not centred
            centre = self.key_codec.centre[:, None, None]
            scores = scores + mx.sum(queries * centre, axis=-1, keepdims=True)
        seen = valid_tokens(metadata, self.block_size, self.shape.sliding_window)[:, None]
        scores = mx.where(seen, scores * rows.scale, -mx.inf)
        weights = softmax_with_sinks(scores, sinks) * value_scales
        weights = mx.where(seen, weights, 0)  # the scale of a token not seen may be a NaN
        out = self._values.weighted_sum(weights, self._slots.value_halfwords(head_pages))
        out = (out @ self._output_matrix).reshape(batch, num_heads, query_len, -1)
        return out.swapaxes(1, 2).astype(rows.queries.dtype)

    def prefill_with_context(self, pages: Pages, chunk: Chunk) -> mx.array:
        keys, values = self._stored(pages, chunk.metadata)  # [1, H, S, D] each
        if not self.reproducible:
            context = chunk.metadata.context_len
            exact = self.key_codec.rotate_keys(chunk.keys.swapaxes(0, 1)).swapaxes(0, 1)[None]
            keys = mx.concatenate([keys[:, :, :context], exact], axis=2)
            exact = self.value_codec.rotate_values(chunk.values)[None]
            values = mx.concatenate([values[:, :, :context], exact], axis=2)
        if chunk.sinks is not None:  # compared with logits of keys that are not centred
            keys = keys + self.key_codec.rotated_centre[:, None]
        rotated = self.key_codec.rotate_queries(chunk.queries.swapaxes(0, 1)).swapaxes(0, 1)[None]
        window = self.shape.sliding_window
        out = causal_attention(rotated, keys, values, chunk.scale, chunk.sinks, window).squeeze(0)
        return self.value_codec.unrotate_outputs(out).astype(chunk.queries.dtype)

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        keys, values = self._slots.load(pages.array, metadata.block_table)
        keys_of_tokens = self.key_codec.dequantize(_tokens_first(keys))
        return keys_of_tokens.swapaxes(1, 2), self.value_codec.dequantize(values)

    def attended_memory(self, query_len: int, seq_len: int, num_heads: int) -> ChunkMemory:
        return causal_memory(query_len, seq_len, num_heads, self.shape.sliding_window)

    def _stored(
        self, pages: Pages, metadata: PrefillMetadata
    ) -> tuple[mx.array, mx.array]:  # [1, H, S, D] each
        """Rotated keys and values of context and chunk as the pages have them."""
        packed_keys, packed_values = self._slots.load(pages.array, metadata.block_table)
        keys = self.key_codec.quantizer.dequantize(packed_keys)
        values = self.value_codec.quantizer.dequantize(packed_values)
        return keys[:, :, : metadata.seq_len], values[:, :, : metadata.seq_len]


def _tokens_first(keys: Quantized) -> Quantized:
    """Swaps [B, H, S, ...] to [B, S, H, ...], the order that `KeyCodec` takes."""
    return Quantized(
        keys.codes.swapaxes(1, 2),
        keys.scales.swapaxes(1, 2),
        None if keys.biases is None else keys.biases.swapaxes(1, 2),
        None if keys.levels is None else keys.levels.swapaxes(1, 2),
    )


def _slot_indices(metadata: AttentionMetadata, slots: Slots) -> tuple[mx.array, mx.array]:
    """`Slots.indices` of the new tokens."""
    return slots.indices(*split_slots(metadata.slot_mapping, slots.layout.block_size))


def _head_page_indices(metadata: AttentionMetadata, slots: Slots) -> tuple[mx.array, mx.array]:
    """`Slots.head_page_indices` of the requests' blocks."""
    return slots.head_page_indices(metadata.block_table)
