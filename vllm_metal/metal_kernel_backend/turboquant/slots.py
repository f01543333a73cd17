"""Quantised tokens into the slots of pages, and out again, in plain MLX.

Pages are uint16 `PageLayout.pages_shape`. A store is one scatter, so that MLX writes in place.
"""

from math import gcd

import mlx.core as mx

from vllm_metal.metal_kernel_backend.turboquant.bitpack import (
    WORDS,
    pack_levels,
    packing,
    unpack,
    unpack_levels,
)
from vllm_metal.metal_kernel_backend.turboquant.formats import GROUP_SIZE
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.quantizer import NAN_SCALE, Quantized


class Slots:
    """Reads and writes the pages of one layout."""

    def __init__(self, layout: PageLayout):
        self.layout = layout
        heads = mx.arange(layout.num_kv_heads)[:, None] * (layout.head_page_bytes // 2)
        self._columns = mx.array(layout.slot_columns())[:, None, :] + heads
        """Where a slot lies in its page, [block_size, H, slot_size / 2]."""
        key = layout.key_head_size, layout.key_format.bits
        value = layout.value_head_size, layout.value_format.bits
        self._pack_codes = packing(key, value)

    def pack(self, tokens: Quantized) -> mx.array:
        """What `TokenCodec` makes of T tokens to uint16 [H, T, slot_size / 2].

        The halfwords are in the order of `PageLayout.slot_columns`.
        """
        scales = tokens.scales
        if tokens.biases is not None:
            key, value = scales[..., :1], scales[..., 1:]
            scales = mx.concatenate([key, tokens.biases, value], axis=-1)
        parts = [self._pack_codes(tokens.codes), scales.view(mx.uint16)]
        if tokens.levels is not None:
            parts.insert(1, pack_levels(tokens.levels))
        return mx.concatenate(parts, axis=-1)

    def indices(self, block_ids: mx.array, offsets: mx.array) -> tuple[mx.array, mx.array]:
        """Where `store` writes T tokens: the same for all layers of a step.

        Args:
            block_ids: block of each token, int32 [T].
            offsets: place of each token in its block, int32 [T].

        Returns:
            blocks and columns, each [H, T, slot_size / 2].
        """
        columns = self._columns[offsets].swapaxes(0, 1)
        return mx.broadcast_to(block_ids[None, :, None], columns.shape), columns

    def store(
        self, pages: mx.array, packed: mx.array, indices: tuple[mx.array, mx.array]
    ) -> mx.array:
        """Pages with packed tokens at the `indices` of their slots.

        In place if the caller keeps no other reference to the pages, and evaluates them before
        the next store.
        """
        pages[indices] = packed
        return pages

    def head_page_indices(self, block_table: mx.array) -> tuple[mx.array, mx.array]:
        """Where `head_pages` reads the blocks [B, N]: the same for all layers of a step."""
        heads = mx.arange(self.layout.num_kv_heads)[None, :, None]
        blocks, heads = mx.broadcast_arrays(block_table[:, None, :], heads)
        return blocks, heads

    def head_pages(self, pages: mx.array, indices: tuple[mx.array, mx.array]) -> mx.array:
        """Head pages of the blocks [B, N] of these `head_page_indices`, [B, H, N, bytes / 2]."""
        layout = self.layout
        shape = pages.shape[0], layout.num_kv_heads, layout.head_page_bytes // 2
        return mx.as_strided(pages, shape, (pages.shape[1], shape[2], 1))[indices]

    def key_halfwords(self, head_pages: mx.array) -> mx.array:
        """Packed keys, [B, H, 1, N * block_size, D_k * bits / 16]."""
        layout = self.layout
        return self._halfwords(head_pages, layout.key_codes_offset, layout.key_codes_bytes)

    def value_halfwords(self, head_pages: mx.array) -> mx.array:
        """Packed values, [B, H, 1, N * block_size, D_v * bits / 16]."""
        layout = self.layout
        return self._halfwords(head_pages, layout.value_codes_offset, layout.value_codes_bytes)

    def scales_and_biases(self, head_pages: mx.array) -> list[mx.array]:
        """Key scales, key biases where there are any, value scales.

        Each float16 [B, H, 1, 1, N * block_size].
        """
        batch, heads, _, end = head_pages.shape
        first, plane = self.layout.key_scales_offset // 2, self.layout.block_size
        planes = head_pages.view(mx.float16)
        return [
            planes[..., begin : begin + plane].reshape(batch, heads, 1, 1, -1)
            for begin in range(first, end, plane)
        ]

    def key_levels(self, head_pages: mx.array) -> mx.array | None:
        """Levels of the keys, uint16 [B, H, 1, N * block_size, D_k / 16], where there are any."""
        layout = self.layout
        planes = layout.key_levels_bytes // 2
        if not planes:
            return None
        batch, heads, blocks, _ = head_pages.shape
        first, end = layout.key_levels_offset // 2, layout.key_scales_offset // 2
        halfwords = head_pages[..., first:end].reshape(batch, heads, blocks, planes, -1)
        levels = unpack_levels(halfwords.swapaxes(-1, -2), layout.key_head_size // GROUP_SIZE)
        return levels.reshape(batch, heads, 1, blocks * layout.block_size, -1)

    def load(self, pages: mx.array, block_table: mx.array) -> tuple[Quantized, Quantized]:
        """The keys and values of blocks [B, N], each [B, H, N * block_size, D].

        A token whose key or value was not finite is read as a key of NaN and a value of zeros: see
        `attention.broken_tokens`.
        """
        head_pages = self.head_pages(pages, self.head_page_indices(block_table))
        key_scales, *biases, value_scales = (
            plane.squeeze((2, 3)) for plane in self.scales_and_biases(head_pages)
        )
        broken = ~(mx.isfinite(key_scales) & mx.isfinite(value_scales))
        key_scales = mx.where(broken, NAN_SCALE, key_scales)
        value_scales = mx.where(broken, mx.zeros((), mx.float16), value_scales)
        levels = self.key_levels(head_pages)
        keys = unpack(self.key_halfwords(head_pages).squeeze(2), self.layout.key_format.bits)
        values = unpack(self.value_halfwords(head_pages).squeeze(2), self.layout.value_format.bits)
        return (
            Quantized(
                keys,
                key_scales,
                biases[0] if biases else None,
                None if levels is None else levels.squeeze(2),
            ),
            Quantized(values, value_scales),
        )

    def _halfwords(self, head_pages: mx.array, offset: int, size: int) -> mx.array:
        """A plane with `size` bytes a token, [B, H, 1, N * block_size, size / 2].

        Copied in words of up to 8 bytes.
        """
        word = gcd(size, 8)
        end = offset + self.layout.block_size * size
        plane = head_pages.view(WORDS[word])[..., offset // word : end // word]
        return plane.reshape(*plane.shape[:2], 1, -1, size // word).view(mx.uint16)
