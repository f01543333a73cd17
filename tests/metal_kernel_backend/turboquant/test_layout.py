"""Every size and offset of a page, over the full product of formats and shapes."""

import itertools

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256)
BLOCK_SIZES = (8, 16, 32)
KV_HEADS = (1, 2, 3, 8)
PAIRS = list(itertools.product(KEY_FORMATS, VALUE_FORMATS))


def layouts(k_quant: str, v_quant: str):
    for shape in itertools.product(HEAD_SIZES, KV_HEADS, BLOCK_SIZES):
        yield PageLayout.of(k_quant, v_quant, *shape)
    yield PageLayout(KEY_FORMATS[k_quant], VALUE_FORMATS[v_quant], 192, 128, 2, 16)


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
def test_planes_tile_the_head_page(k_quant, v_quant):
    """The planes follow one another without gap or overlap, each on a multiple of 16 bytes."""
    for layout in layouts(k_quant, v_quant):
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


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
def test_page_size_is_the_bytes_of_the_array(k_quant, v_quant):
    for layout in layouts(k_quant, v_quant):
        bits = layout.key_head_size * int(layout.key_format.bits)
        bits += layout.value_head_size * int(layout.value_format.bits)
        numbers = 3 if k_quant.startswith("uint") else 2
        if layout.key_head_size >= 128 and k_quant in ("q4_0", "q5_0", "q6_0", "q8_0"):
            numbers += -(-layout.key_head_size // 64)  # four levels in a halfword
        assert layout.slot_size == bits // 8 + 2 * numbers
        page = layout.block_size * layout.num_kv_heads * layout.slot_size
        assert layout.page_size_bytes == page
        assert np.zeros(layout.pages_shape(3), np.uint16).nbytes == 3 * page


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
def test_slots_tile_the_head_page(k_quant, v_quant):
    """Each halfword of a head page belongs to one token, once."""
    for layout in layouts(k_quant, v_quant):
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
