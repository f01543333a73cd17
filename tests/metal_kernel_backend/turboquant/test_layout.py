"""Every size and offset of a page, for each key format with every value format and shape."""

import itertools

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256)
BLOCK_SIZES = (8, 16, 32)
KV_HEADS = (1, 2, 3, 8)
KEY_BYTES = {
    # head size: 64, 128, 256
    "q2_0": (18, 34, 66),
    "q3_0": (26, 50, 98),
    "q4_0": (34, 70, 138),
    "q5_0": (42, 86, 170),
    "q6_0": (50, 102, 202),
    "q8_0": (66, 134, 266),
    "int2": (18, 34, 66),
    "int4": (34, 66, 130),
    "int8": (66, 130, 258),
    "uint2": (20, 36, 68),
    "uint4": (36, 68, 132),
    "uint8": (68, 132, 260),
}
"""Bytes of a stored key: codes, a scale of two, four levels in each two bytes, a bias of two."""

VALUE_BYTES = {
    "q2_0": (18, 34, 66),
    "q3_0": (26, 50, 98),
    "q4_0": (34, 66, 130),
    "q5_0": (42, 82, 162),
    "q6_0": (50, 98, 194),
    "q8_0": (66, 130, 258),
}
"""Bytes of a stored value, which has no levels and no bias."""


def layouts(k_quant: str):
    for v_quant in VALUE_FORMATS:
        for shape in itertools.product(HEAD_SIZES, KV_HEADS, BLOCK_SIZES):
            yield PageLayout.of(k_quant, v_quant, *shape)
        yield PageLayout(KEY_FORMATS[k_quant], VALUE_FORMATS[v_quant], 192, 128, 2, 16)


@pytest.mark.parametrize("k_quant", KEY_FORMATS)
def test_planes_tile_the_head_page(k_quant):
    """The planes follow one another without gap or overlap, each on a multiple of 16 bytes."""
    for layout in layouts(k_quant):
        planes = [
            (layout.key_codes_offset, layout.block_size * layout.key_codes_bytes),
            (layout.value_codes_offset, layout.block_size * layout.value_codes_bytes),
            (layout.key_levels_offset, layout.block_size * layout.key_levels_bytes),
            (layout.key_scales_offset, layout.block_size * 2),
            (layout.key_biases_offset, layout.block_size * 2 * layout.key_format.has_bias),
            (layout.value_scales_offset, layout.block_size * 2),
        ]
        end = 0
        for offset, size in planes:
            assert offset == end and offset % 16 == 0
            end += size
        assert end == layout.head_page_bytes


@pytest.mark.parametrize("k_quant", KEY_FORMATS)
def test_a_page_is_the_bytes_of_its_tokens(k_quant):
    for v_quant, (i, head_size) in itertools.product(VALUE_FORMATS, enumerate((64, 128, 256))):
        token = KEY_BYTES[k_quant][i] + VALUE_BYTES[v_quant][i]
        for num_kv_heads, block_size in itertools.product(KV_HEADS, BLOCK_SIZES):
            layout = PageLayout.of(k_quant, v_quant, head_size, num_kv_heads, block_size)
            assert layout.slot_size == token
            assert layout.page_size_bytes == num_kv_heads * block_size * token


@pytest.mark.parametrize("k_quant", KEY_FORMATS)
def test_slots_tile_the_head_page(k_quant):
    """Each halfword of a head page belongs to one token, once."""
    for layout in layouts(k_quant):
        columns = layout.slot_columns()
        assert columns.shape == (layout.block_size, layout.slot_size // 2)
        assert (np.sort(columns, axis=None) == np.arange(layout.head_page_bytes // 2)).all()


def test_slot_columns_by_hand():
    """The second token of a block of q8_0 / q3_0 at head size 64: 32 + 12 + 1 + 1 halfwords."""
    columns = PageLayout.of("q8_0", "q3_0", 64, 3, 16).slot_columns()[1]
    assert columns[:32].tolist() == list(range(32, 64))
    assert columns[32:44].tolist() == list(range(512 + 12, 512 + 24))
    assert columns[44:].tolist() == [512 + 192 + 1, 512 + 192 + 16 + 1]


def test_slot_columns_with_levels_by_hand():
    """The third token of a block of q4_0 / q2_0 at head size 128: two planes of levels."""
    columns = PageLayout.of("q4_0", "q2_0", 128, 3, 16).slot_columns()[2]
    codes = 16 * (32 + 16)
    assert columns[:32].tolist() == list(range(64, 96))
    assert columns[32:48].tolist() == list(range(512 + 32, 512 + 48))
    assert columns[48:].tolist() == [codes + 2, codes + 16 + 2, codes + 32 + 2, codes + 48 + 2]


def test_ratios_of_the_published_pairs():
    ratios = {
        ("q8_0", "q3_0"): 2.78,
        ("q6_0", "q4_0"): 3.05,
        ("q5_0", "q4_0"): 3.37,
        ("q5_0", "q3_0"): 3.76,
        ("q4_0", "q4_0"): 3.76,
        ("q4_0", "q3_0"): 4.27,
        ("q4_0", "q2_0"): 4.92,
        ("q3_0", "q3_0"): 4.92,
    }
    for (k_quant, v_quant), ratio in ratios.items():
        layout = PageLayout.of(k_quant, v_quant, 64, 3, 16)
        assert 16 / layout.bits_per_element == pytest.approx(ratio, abs=0.005)
    assert PageLayout.of("q8_0", "q3_0", 64, 3, 16).slot_size == 92


def test_template_holds_the_layout():
    layout = PageLayout.of("uint4", "q3_0", 80, 5, 16)
    template = dict(layout.template())
    assert all(type(value) is int for value in template.values())
    assert (template["KEY_HAS_BIAS"], template["KEY_HAS_LEVELS"]) == (1, 0)
    assert template["KEY_BIASES_OFFSET"] == layout.key_biases_offset
    assert template["VALUE_SCALES_OFFSET"] == layout.value_scales_offset
    assert template["HEAD_PAGE_BYTES"] * 5 == layout.page_size_bytes


def test_template_holds_the_levels():
    layout = PageLayout.of("q5_0", "q3_0", 128, 5, 16)
    template = dict(layout.template())
    assert (template["KEY_HAS_LEVELS"], template["KEY_TERMS"]) == (1, 1)
    assert template["KEY_LEVELS_OFFSET"] == layout.key_levels_offset
    assert template["KEY_SCALES_OFFSET"] - template["KEY_LEVELS_OFFSET"] == 16 * 4


@pytest.mark.parametrize("head_size", [0, -64, 1, 8, 24, 63, 65, 72, 100, 144, 176, 1024])
def test_head_sizes_without_a_rotation_are_refused(head_size):
    with pytest.raises(ValueError, match=rf"head size {head_size} has no rotation; allowed: m"):
        PageLayout.of("q8_0", "q3_0", head_size, 2, 16)


@pytest.mark.parametrize("block_size", [0, -8, 4, 12, 17])
def test_block_sizes_that_break_alignment_are_refused(block_size):
    with pytest.raises(ValueError, match=rf"block size {block_size} is not"):
        PageLayout.of("q8_0", "q3_0", 64, 2, block_size)
