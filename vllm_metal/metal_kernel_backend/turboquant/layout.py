"""Bytes of a page.

Each layer has one array of pages, [num_blocks, page]. A page is num_kv_heads head pages, and unused
bytes where blocks are padded to a size that other layers share. A head page holds the block_size
tokens of one KV head in planes, so that a run of tokens is a run of bytes:

    0               value_codes_offset         key_levels_offset      value_scales_offset
    ├── key codes ────┼── value codes ─────┼ key levels ┬ key scales ┬ key biases ┼ value scales ┤
      block_size x D_k b_k/8      x D_v b_v/8     x 2 D_k/64     x 2          x 2            x 2

In a plane tokens follow one another. Codes are packed as in `bitpack`; scales and biases are
float16. Key levels, where the format has them, are planes of halfwords: the first has levels 0 to 3
of every token, 4 bits each, and so on. Every plane begins on a multiple of 16 bytes.
"""

from dataclasses import dataclass

import numpy as np

from vllm_metal.metal_kernel_backend.paged.constants_header import BLOCK_SIZE_STEP
from vllm_metal.metal_kernel_backend.turboquant.bitpack import CHUNK
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    Format,
    FormatPair,
    key_format,
    value_format,
)

MIN_POWER = 16
MAX_HEAD_SIZE = 512
ODD_FACTORS = (1, 3, 5, 7)


def check_head_size(head_size: int) -> None:
    """Raise ValueError unless vectors of this size can be rotated and packed."""
    power = head_size & -head_size if head_size > 0 else 0
    if power < MIN_POWER or head_size // power not in ODD_FACTORS or head_size > MAX_HEAD_SIZE:
        raise ValueError(
            f"head size {head_size} has no rotation; allowed: m * 2^k with m in {ODD_FACTORS} "
            f"and 2^k at least {MIN_POWER}, up to {MAX_HEAD_SIZE} (64, 80, 96, 112, 128, 160, ...)"
        )


@dataclass(frozen=True)
class PageLayout:
    """Every size and offset of the pages of one layer, in bytes unless said otherwise.

    Raises ValueError for a head size without a rotation, or a block size not a multiple of 8.
    """

    key_format: Format
    value_format: Format
    key_head_size: int
    value_head_size: int
    num_kv_heads: int
    block_size: int
    """Tokens in a block."""
    padded_page_bytes: int = 0
    """Bytes from one block to the next where that is more than its head pages; a multiple of 16."""

    @classmethod
    def of(
        cls, k_quant: str, v_quant: str, head_size: int, num_kv_heads: int, block_size: int
    ) -> "PageLayout":
        """The layout for format names and keys and values of one size."""
        key, value = key_format(k_quant), value_format(v_quant)
        return cls(key, value, head_size, head_size, num_kv_heads, block_size)

    def __post_init__(self) -> None:
        check_head_size(self.key_head_size)
        check_head_size(self.value_head_size)
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_STEP:
            raise ValueError(
                f"block size {self.block_size} is not a positive multiple of {BLOCK_SIZE_STEP}"
            )
        if self.num_kv_heads <= 0:
            raise ValueError(f"{self.num_kv_heads} KV heads; at least 1 is needed")
        unpadded = self.num_kv_heads * self.head_page_bytes
        if self.padded_page_bytes and (
            self.padded_page_bytes < unpadded or self.padded_page_bytes % 16
        ):
            raise ValueError(
                f"a page of {self.padded_page_bytes} bytes; it needs at least {unpadded} and a "
                "multiple of 16"
            )

    @property
    def key_codes_bytes(self) -> int:
        """Codes of one key."""
        return self.key_format.codes_bytes(self.key_head_size)

    @property
    def value_codes_bytes(self) -> int:
        """Codes of one value."""
        return self.value_format.codes_bytes(self.value_head_size)

    @property
    def slot_size(self) -> int:
        """One token of one KV head, key and value."""
        formats = FormatPair(self.key_format, self.value_format)
        return formats.slot_size(self.key_head_size, self.value_head_size)

    @property
    def head_page_bytes(self) -> int:
        """block_size tokens of one KV head."""
        return self.block_size * self.slot_size

    @property
    def page_size_bytes(self) -> int:
        """One block of one layer, all KV heads and the padding."""
        return self.padded_page_bytes or self.num_kv_heads * self.head_page_bytes

    @property
    def key_codes_offset(self) -> int:
        return 0

    @property
    def value_codes_offset(self) -> int:
        return self.block_size * self.key_codes_bytes

    @property
    def key_levels_bytes(self) -> int:
        """Levels of one key; 0 unless the key format has them."""
        return self.key_format.levels_bytes(self.key_head_size)

    @property
    def key_levels_offset(self) -> int:
        return self.value_codes_offset + self.block_size * self.value_codes_bytes

    @property
    def key_scales_offset(self) -> int:
        return self.key_levels_offset + self.block_size * self.key_levels_bytes

    @property
    def key_biases_offset(self) -> int:
        """Where the key biases are; an empty plane unless the key format has them."""
        return self.key_scales_offset + self.block_size * 2

    @property
    def value_scales_offset(self) -> int:
        biases = 2 if self.key_format.has_bias else 0
        return self.key_biases_offset + self.block_size * biases

    @property
    def bits_per_element(self) -> float:
        """Stored bits per coordinate, keys and values averaged, metadata included."""
        return 8 * self.slot_size / (self.key_head_size + self.value_head_size)

    @property
    def lane_elements(self) -> int:
        """Elements of a key or value that a lane of the decode kernel holds."""
        return CHUNK

    def pages_shape(self, num_blocks: int) -> tuple[int, int]:
        """Shape of the array of pages, in uint16 halfwords."""
        return num_blocks, self.page_size_bytes // 2

    def slot_columns(self) -> np.ndarray:
        """Where a slot lies in its head page, in halfwords: int32 [block_size, slot_size / 2].

        Row t belongs to token t of the block. Its halfwords are those of the key's codes, the
        value's codes, the key's levels, scale and bias, and the value's scale.
        """
        codes = [
            (self.key_codes_offset, self.key_codes_bytes),
            (self.value_codes_offset, self.value_codes_bytes),
        ]
        halfword_planes = range(self.key_levels_offset, self.head_page_bytes, 2 * self.block_size)
        planes = [*codes, *((offset, 2) for offset in halfword_planes)]
        tokens = np.arange(self.block_size)[:, None]
        columns = [(offset + tokens * size + np.arange(0, size, 2)) // 2 for offset, size in planes]
        return np.concatenate(columns, axis=1).astype(np.int32)

    def template(self) -> list[tuple[str, int]]:
        """The numbers a kernel is compiled for. Offsets are in bytes within a head page."""
        return [
            ("NUM_KV_HEADS", self.num_kv_heads),
            ("BLOCK_SIZE", self.block_size),
            ("KEY_HEAD_SIZE", self.key_head_size),
            ("VALUE_HEAD_SIZE", self.value_head_size),
            ("KEY_BITS", self.key_format.bits),
            ("VALUE_BITS", self.value_format.bits),
            ("KEY_TERMS", self.key_format.num_terms(self.key_head_size)),
            ("VALUE_TERMS", self.value_format.num_terms(self.value_head_size)),
            ("KEY_HAS_LEVELS", int(self.key_format.has_levels(self.key_head_size))),
            ("KEY_HAS_BIAS", int(self.key_format.has_bias)),
            ("PAGE_BYTES", self.page_size_bytes),
            ("HEAD_PAGE_BYTES", self.head_page_bytes),
            ("VALUE_CODES_OFFSET", self.value_codes_offset),
            ("KEY_LEVELS_OFFSET", self.key_levels_offset),
            ("KEY_SCALES_OFFSET", self.key_scales_offset),
            ("KEY_BIASES_OFFSET", self.key_biases_offset),
            ("VALUE_SCALES_OFFSET", self.value_scales_offset),
        ]
