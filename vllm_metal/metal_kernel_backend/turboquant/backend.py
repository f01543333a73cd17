"""TurboQuant pages behind the attention boundary.

`TurboQuantAttention` holds what every path shares: the layout, the codecs with the layer's
calibrated constants, the pages. `TurboQuantReference` stores and attends on MLX operations; it is
the path wherever no kernel target exists, and the kernels' meaning in readable form.

A prefill chunk attends over its own exact keys and values and over its compressed context; a
decode step reads everything compressed. That keeps a prompt that fits in one chunk free of loss,
but makes the low bits of a result depend on how the prompt was cut into chunks, on prefix-cache
hits and on preemption. With `reproducible`, a chunk reads its own keys and values through the
quantiser too, and the result depends on nothing but the tokens.
"""

from abc import abstractmethod

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape, Pages, PrefillChunk
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import (
    causal_attention,
    causal_chunk,
    finite,
    softmax_with_sinks,
    valid_tokens,
)
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, TokenCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.products import (
    PackedVectors,
    output_matrix,
    query_matrices,
)
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized
from vllm_metal.metal_kernel_backend.turboquant.slots import Slots


class TurboQuantAttention(AttentionBackend):
    """Compressed paged attention of one layer.

    Args:
        shape: heads and head sizes of the layer.
        block_size: tokens of a block, a multiple of 8.
        formats: key and value format.
        constants: the layer's calibrated centre and multiplier.
        reproducible: read a chunk's own keys and values compressed, too.
        page_bytes: bytes of a page where it is longer than its slots.

    Raises:
        ValueError: the head size has no rotation, or the block size is not a multiple of 8.
    """

    compressed = True
    page_dtype = mx.uint16

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: tuple[Format, Format],
        constants: KeyConstants,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, page_bytes)
        self.formats = formats
        self.reproducible = reproducible
        self.layout = PageLayout(
            *formats, shape.head_size, shape.head_size_v, shape.num_kv_heads, block_size, page_bytes
        )
        self.slots = Slots(self.layout)
        self.key_codec = KeyCodec(formats[0], constants.centre, constants.multiplier)
        self.value_codec = ValueCodec(formats[1], shape.head_size_v)
        self.name = f"turboquant {formats[0].name}/{formats[1].name}"

    @property
    def format_names(self) -> tuple[str, str]:
        """Key and value format."""
        return self.formats[0].name, self.formats[1].name

    @property
    def slot_size(self) -> int:
        return self.layout.slot_size

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
        if not (self.reproducible or metadata.context_len):
            own = queries[None], keys[None], values[None]
            return causal_attention(*own, scale, sinks, self.shape.sliding_window)[0]
        return self._prefill_compressed(pages, queries, keys, values, metadata, scale, sinks)

    @abstractmethod
    def _prefill_compressed(
        self,
        pages: Pages,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """`prefill` of a chunk that reads compressed tokens: its context, or its own."""


class TurboQuantReference(TurboQuantAttention):
    """The plain MLX path."""

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: tuple[Format, Format],
        constants: KeyConstants,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, formats, constants, reproducible, page_bytes)
        self._codec = TokenCodec(self.key_codec, self.value_codec)
        self._keys = PackedVectors(formats[0], shape.head_size)
        self._values = PackedVectors(formats[1], shape.head_size_v)
        self._query_matrices = query_matrices(constants.multiplier, self._keys)
        self._output_matrix = output_matrix(self._values, shape.head_size_v)

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        packed = self.slots.pack(self._codec.quantize(keys, finite(values)))
        indices = metadata.derived.once(
            ("slot_indices", self.layout), lambda: self.slots.indices(metadata.slot_mapping)
        )
        return (self.slots.store(pages[0], packed, indices),)

    def decode(
        self,
        pages: Pages,
        queries: mx.array,
        metadata: DecodeMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        indices = metadata.derived.once(
            ("head_page_indices", self.shape.num_kv_heads),
            lambda: self.slots.head_page_indices(metadata.block_table),
        )
        head_pages = self.slots.head_pages(pages[0], indices)
        key_scales, *biases, value_scales = self.slots.scales_and_biases(
            head_pages
        )  # [B, H, 1, 1, S] each
        batch, num_heads, size = queries.shape
        rows = queries.astype(mx.float32).reshape(batch, self.shape.num_kv_heads, -1, 1, size)
        rotated = rows @ self._query_matrices  # [B, H, G, 1, L]
        keys = self.slots.key_halfwords(head_pages), self.slots.key_levels(head_pages)
        scores = self._keys.products(rotated, *keys) * key_scales
        if biases:
            total = mx.sum(rotated, axis=-1, keepdims=True) / self._keys.gain
            scores = scores + total * biases[0]
        if sinks is not None:  # compared with logits of keys that are not centred
            centre = self.key_codec.centre[:, None, None]
            scores = scores + mx.sum(rows * centre, axis=-1, keepdims=True)
        seen = valid_tokens(metadata, self.block_size, self.shape.sliding_window)[:, None]
        scores = mx.where(seen, scores * scale, -mx.inf)
        weights = softmax_with_sinks(scores, sinks) * value_scales
        weights = mx.where(seen, weights, 0)  # the scale of a token not seen may be a NaN
        out = self._values.weighted_sum(weights, self.slots.value_halfwords(head_pages))
        return (out @ self._output_matrix).reshape(batch, num_heads, -1).astype(queries.dtype)

    def _prefill_compressed(
        self,
        pages: Pages,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        stored_keys, stored_values = self._stored(pages, metadata)  # [1, H, S, D] each
        if not self.reproducible:
            context = metadata.context_len
            exact = self.key_codec.rotate_keys(keys.swapaxes(0, 1)).swapaxes(0, 1)[None]
            stored_keys = mx.concatenate([stored_keys[:, :, :context], exact], axis=2)
            exact = self.value_codec.rotate_values(values)[None]
            stored_values = mx.concatenate([stored_values[:, :, :context], exact], axis=2)
        if sinks is not None:  # compared with logits of keys that are not centred
            stored_keys = stored_keys + self.key_codec.rotated_centre[:, None]
        rotated = self.key_codec.rotate_queries(queries.swapaxes(0, 1)).swapaxes(0, 1)[None]
        window = self.shape.sliding_window
        out = causal_attention(rotated, stored_keys, stored_values, scale, sinks, window)[0]
        return self.value_codec.unrotate_outputs(out).astype(queries.dtype)

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        keys, values = self.slots.load(pages[0], metadata.block_table)
        parts = keys.codes, keys.scales, keys.biases, keys.levels
        tokens_first = (None if part is None else part.swapaxes(1, 2) for part in parts)
        keys = self.key_codec.dequantize(Quantized(*tokens_first))
        return keys.swapaxes(1, 2), self.value_codec.dequantize(values)

    def attended_chunk(self, query_len: int, seq_len: int, num_heads: int) -> PrefillChunk:
        return causal_chunk(query_len, seq_len, num_heads, self.shape.sliding_window)

    def _stored(
        self, pages: Pages, metadata: PrefillMetadata
    ) -> tuple[mx.array, mx.array]:  # [1, H, S, D] each
        """Rotated keys and values of context and chunk as the pages have them."""
        keys, values = self.slots.load(pages[0], metadata.block_table)
        keys = self.key_codec.quantizer.dequantize(keys)
        values = self.value_codec.quantizer.dequantize(values)
        return keys[:, :, : metadata.seq_len], values[:, :, : metadata.seq_len]
