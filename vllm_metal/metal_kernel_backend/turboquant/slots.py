"""Quantised tokens into the slots of pages, and out again, in plain MLX.

Pages are uint16 `SlotLayout.pages_shape`. A store is one scatter, so that MLX writes in place.
"""

from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack, unpack
from vllm_metal.metal_kernel_backend.turboquant.codec import Quantized
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout


@dataclass(frozen=True)
class Slots:
    """Reads and writes the pages of one layout."""

    layout: SlotLayout

    def __post_init__(self) -> None:
        halfwords = self.layout.head_page_bytes // 2
        heads = mx.arange(self.layout.num_kv_heads)[:, None] * halfwords
        columns = mx.array(self.layout.slot_columns())[:, None, :] + heads
        object.__setattr__(self, "_columns", columns)  # [block_size, H, slot_size / 2]

    def allocate(self, num_blocks: int) -> mx.array:
        """Pages of zeros; a slot never written holds zero vectors."""
        return mx.zeros(self.layout.pages_shape(num_blocks), mx.uint16)

    def pack(self, keys: Quantized, values: Quantized) -> mx.array:
        """Keys [T, H, D_k] and values [T, H, D_v] to uint16 [T, H, slot_size / 2].

        The halfwords are in the order of `SlotLayout.slot_columns`.
        """
        layout = self.layout
        parts = [
            pack(keys.codes, layout.key_format.bits),
            pack(values.codes, layout.value_format.bits),
            keys.scales.view(mx.uint16)[..., None],
            values.scales.view(mx.uint16)[..., None],
        ]
        if keys.biases is not None:
            parts.insert(3, keys.biases.view(mx.uint16)[..., None])
        return mx.concatenate(parts, axis=-1)

    def indices(self, slot_mapping: mx.array) -> tuple[mx.array, mx.array]:
        """Where `store` writes the tokens of these slots: the same for all layers of a step.

        A slot is block * block_size + token, int32 [T]; one below 0 is padding and goes to the
        null block, block 0.
        """
        slots = mx.maximum(slot_mapping, 0)
        blocks = (slots // self.layout.block_size)[:, None, None]
        return blocks, self._columns[slots % self.layout.block_size]

    def store(
        self,
        pages: mx.array,
        packed: mx.array,
        slots: mx.array | tuple[mx.array, mx.array],
    ) -> mx.array:
        """Pages with packed tokens at their slots, or at the `indices` of these.

        In place if the caller keeps no other reference to the pages, and evaluates them before
        the next store.
        """
        pages[slots if isinstance(slots, tuple) else self.indices(slots)] = packed
        return pages

    def head_pages(self, pages: mx.array) -> mx.array:
        """The same bytes without padding, uint16 [num_blocks, H, head_page_bytes / 2]."""
        layout = self.layout
        shape = pages.shape[0], layout.num_kv_heads, layout.head_page_bytes // 2
        return mx.as_strided(pages, shape, (pages.shape[1], shape[2], 1))

    def load(self, pages: mx.array, block_ids: mx.array) -> tuple[Quantized, Quantized]:
        """The keys and values of blocks [..., N], each [..., H, N * block_size, D]."""
        layout = self.layout
        head_pages = mx.moveaxis(self.head_pages(pages)[block_ids], -3, -2)  # [..., H, N, -1]
        keys = Quantized(
            self._codes(
                head_pages, layout.key_codes_offset, layout.key_format.bits, layout.key_codes_bytes
            ),
            self._floats(head_pages, layout.key_scales_offset),
            self._floats(head_pages, layout.key_biases_offset)
            if layout.key_format.has_bias
            else None,
        )
        values = Quantized(
            self._codes(
                head_pages,
                layout.value_codes_offset,
                layout.value_format.bits,
                layout.value_codes_bytes,
            ),
            self._floats(head_pages, layout.value_scales_offset),
        )
        return keys, values

    def _codes(self, head_pages: mx.array, offset: int, bits: int, size: int) -> mx.array:
        """The codes of a plane, `size` bytes a token, [..., H, N * block_size, D]."""
        begin, end = offset // 2, (offset + self.layout.block_size * size) // 2
        *lead, blocks, _ = head_pages.shape
        halfwords = head_pages[..., begin:end]
        return unpack(halfwords.reshape(*lead, blocks * self.layout.block_size, size // 2), bits)

    def _floats(self, head_pages: mx.array, offset: int) -> mx.array:
        """The float16 of a plane, [..., H, N * block_size]."""
        begin = offset // 2
        halfwords = head_pages[..., begin : begin + self.layout.block_size]
        return mx.contiguous(halfwords).view(mx.float16).flatten(-2)
