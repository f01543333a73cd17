"""Slots: what is stored where, byte by byte, and that a store writes in place."""

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs, reference
from vllm_metal.attention.slots import compose_slots, split_slots
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import GroupedQuantizer
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized, Quantizer
from vllm_metal.metal_kernel_backend.turboquant.slots import Slots

PAIRS = [("q8_0", "q3_0"), ("q5_0", "q6_0"), ("q4_0", "q2_0"), ("uint4", "q5_0"), ("int2", "q8_0")]


def tokens(layout: PageLayout, count: int, seed: int = 0) -> tuple[Quantized, Quantized]:
    """Quantised Gaussian keys and values, [count, H, D]."""
    rng = np.random.default_rng(seed)
    pair = []
    for format, size in (
        (layout.key_format, layout.key_head_size),
        (layout.value_format, layout.value_head_size),
    ):
        x = rng.standard_normal((count, layout.num_kv_heads, size)).astype(np.float32)
        levels = not pair and format.has_levels(size)
        quantizer = GroupedQuantizer(format, size) if levels else Quantizer([(format, False)], size)
        pair.append(quantizer.quantize(mx.array(x)))
    return pair[0], pair[1]


def packed(slots: Slots, keys: Quantized, values: Quantized) -> mx.array:
    """As `Slots.pack` has them, heads first."""
    biases = None if keys.biases is None else keys.biases[..., None].swapaxes(0, 1)
    return slots.pack(
        Quantized(
            mx.concatenate([keys.codes, values.codes], axis=-1).swapaxes(0, 1),
            mx.stack([keys.scales, values.scales], axis=-1).swapaxes(0, 1),
            biases,
            None if keys.levels is None else keys.levels.swapaxes(0, 1),
        )
    )


def no_tokens(layout: PageLayout, num_blocks: int) -> mx.array:
    """Pages of zeros."""
    return mx.zeros(layout.pages_shape(num_blocks), mx.uint16)


def slots_of(block_ids: list[int], length: int, block_size: int) -> mx.array:
    """The first `length` tokens of a request that owns these blocks."""
    return mx.array(compose_slots(np.array([block_ids]), np.arange(length)[None], block_size)[0])


def indices_of(slots: Slots, mapping: mx.array) -> tuple[mx.array, mx.array]:
    return slots.indices(*split_slots(mapping, slots.layout.block_size))


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (128, 128), (160, 64), (192, 128)])
def test_bytes_of_a_page(k_quant, v_quant, sizes):
    """Every byte of every plane, from the offsets of the layout and the oracle's packing."""
    layout = PageLayout(KEY_FORMATS[k_quant], VALUE_FORMATS[v_quant], *sizes, 2, 8)
    slots = Slots(layout)
    keys, values = tokens(layout, 24)
    mapping = np.random.default_rng(1).permutation(24)
    indices = indices_of(slots, mx.array(mapping))
    pages = slots.store(no_tokens(layout, 3), packed(slots, keys, values), indices)
    memory = np.array(pages).tobytes()
    assert len(memory) == 3 * layout.page_size_bytes

    def plane(block: int, head: int, offset: int, token: int, size: int) -> bytes:
        start = (block * 2 + head) * layout.head_page_bytes + offset + token * size
        return memory[start : start + size]

    for i, slot in enumerate(mapping):
        for head in range(2):
            place = (slot // 8, head)
            codes = reference.pack(np.array(keys.codes[i, head]), layout.key_format.bits)
            size = layout.key_codes_bytes
            assert plane(*place, layout.key_codes_offset, slot % 8, size) == codes.tobytes()
            codes = reference.pack(np.array(values.codes[i, head]), layout.value_format.bits)
            size = layout.value_codes_bytes
            assert plane(*place, layout.value_codes_offset, slot % 8, size) == codes.tobytes()
            scales = [(layout.key_scales_offset, keys.scales)]
            scales.append((layout.value_scales_offset, values.scales))
            if keys.biases is not None:
                scales.append((layout.key_biases_offset, keys.biases))
            if keys.levels is not None:
                for j, level in enumerate(keys.levels[i, head].tolist()):
                    offset = layout.key_levels_offset + j // 4 * 2 * layout.block_size
                    halfword = int.from_bytes(plane(*place, offset, slot % 8, 2), "little")
                    assert halfword >> (j % 4 * 4) & 15 == level
            for offset, numbers in scales:
                expected = np.array(numbers[i, head]).astype(np.float16).tobytes()
                assert plane(*place, offset, slot % 8, 2) == expected


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 8), (64, 16), (64, 32), (160, 16)])
def test_what_is_stored_is_loaded(k_quant, v_quant, head_size, block_size):
    layout = PageLayout.of(k_quant, v_quant, head_size, 3, block_size)
    slots = Slots(layout)
    for length in inputs.lengths(block_size):
        blocks = [7, 2, 9, 4, 1][: -(-length // block_size)]
        keys, values = tokens(layout, length)
        indices = indices_of(slots, slots_of(blocks, length, block_size))
        pages = slots.store(no_tokens(layout, 10), packed(slots, keys, values), indices)
        loaded = slots.load(pages, mx.array([blocks]))
        for stored, found in zip((keys, values), loaded, strict=True):
            assert found.codes.shape == (1, 3, len(blocks) * block_size, head_size)
            codes = np.array(found.codes)[0, :, :length].swapaxes(0, 1)
            assert (codes == np.array(stored.codes)).all()
            scales = np.array(found.scales)[0, :, :length].swapaxes(0, 1)
            assert (scales == np.array(stored.scales)).all()
            assert (np.array(found.scales)[0, :, length:] == 0).all()
            assert (found.biases is None) == (stored.biases is None)
            assert (found.levels is None) == (stored.levels is None)
            if stored.levels is not None:
                levels = np.array(found.levels)[0, :, :length].swapaxes(0, 1)
                assert (levels == np.array(stored.levels)).all()


def test_tokens_stored_one_by_one_are_as_stored_together():
    layout = PageLayout.of("q5_0", "q3_0", 64, 2, 8)
    slots = Slots(layout)
    keys, values = tokens(layout, 11)
    halfwords = packed(slots, keys, values)
    mapping = slots_of([3, 1], 11, 8)
    together = slots.store(no_tokens(layout, 4), halfwords, indices_of(slots, mapping))
    single = no_tokens(layout, 4)
    for i in range(11):
        indices = indices_of(slots, mapping[i : i + 1])
        single = slots.store(single, halfwords[:, i : i + 1], indices)
        mx.eval(single)
    assert (np.array(together) == np.array(single)).all()


def test_a_slot_never_written_reads_as_zero():
    layout = PageLayout.of("uint8", "q8_0", 64, 1, 8)
    keys, values = Slots(layout).load(no_tokens(layout, 2), mx.array([[1]]))
    key = Quantizer([(layout.key_format, False)], 64).dequantize(keys)
    value = Quantizer([(layout.value_format, True)], 64).dequantize(values)
    assert (np.array(key) == 0).all() and (np.array(value) == 0).all()


def test_a_store_is_in_place():
    """Hundreds of stores of 16 tokens into 50 MB take no second copy of the pages."""
    layout = PageLayout.of("q8_0", "q3_0", 64, 3, 16)
    slots = Slots(layout)
    owner = [no_tokens(layout, 12_000)]
    halfwords = packed(slots, *tokens(layout, 16))
    mx.eval(owner, halfwords)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for step in range(200):
        mapping = mx.array((np.arange(16) * 11_987 + step) % 190_000)
        owner[0] = slots.store(owner[0], halfwords, indices_of(slots, mapping))
        mx.eval(owner)
    assert mx.get_peak_memory() - before < 0.01 * owner[0].nbytes
