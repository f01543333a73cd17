"""Packing of codes into halfwords: golden bytes, round trips, the rule bit by bit."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from vllm_metal.metal_kernel_backend.turboquant.bitpack import (
    lane_elements,
    lanes,
    pack,
    pack_levels,
    packing,
    unpack,
    unpack_levels,
)

GOLDEN = {
    2: "39393939",
    3: "f1503a6343f5",
    4: "610ba54fe9832dc7",
    5: "c12cb06a9fa46ee25d1c",
    6: "81d10bb495061f79a90b333e",
    7: "01c30b48150d1f522997335c3da1",
    8: "01060b10151a1f24292e33383d42474c",
}
"""Little-endian bytes of codes 1, 6, 11, ... (mod 2^bits). At 3 bits the first halfword holds
1, 6, 3, 0, 5: 1 | 6 << 3 | 3 << 6 | 0 << 9 | 5 << 12 = 0x50f1; code 15 is 4 = 0b100, so bit 15 is
set in the third halfword alone."""


@pytest.mark.parametrize("bits", range(2, 9))
def test_golden_bytes(bits):
    codes = (np.arange(16) * 5 + 1) % (1 << bits)
    halfwords = pack(mx.array(codes), bits)
    assert np.array(halfwords).astype("<u2").tobytes().hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("head_size", [16, 64, 80, 112, 256])
def test_round_trip(bits, head_size):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 3, head_size), np.uint8)
    halfwords = pack(mx.array(codes), bits)
    assert halfwords.dtype == mx.uint16
    assert halfwords.shape == (5, 3, head_size * bits // 16)
    assert (np.array(unpack(halfwords, bits)) == codes).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_halfwords_follow_the_rule(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 96, np.uint8)
    halfwords = np.array(pack(mx.array(codes), bits))
    assert (halfwords == reference.pack(codes, bits)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_is_used_once(bits):
    """Setting one bit of one code sets one bit of the halfwords, another for each."""
    codes = np.zeros((16 * bits, 16), np.uint8)
    for i in range(16 * bits):
        codes[i, i // bits] = 1 << (i % bits)
    halfwords = np.array(pack(mx.array(codes), bits)).astype(np.uint64)
    assert [int(row).bit_count() for row in halfwords.sum(axis=1)] == [1] * (16 * bits)
    assert (halfwords.sum(axis=0) == 0xFFFF).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("head_size", [16, 80])
def test_lanes_hold_the_elements_they_say(bits, head_size):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 3, head_size), np.uint8)
    parts = lanes(pack(mx.array(codes), bits), bits)
    elements = lane_elements(head_size, bits)
    for part, which in zip(parts, elements, strict=True):
        expected = np.where(which < 0, 0, codes[..., which])
        assert part.dtype == mx.uint8
        assert (np.array(part) == expected).all()
    held = np.concatenate(elements)
    assert sorted(held[held >= 0]) == list(range(head_size))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("others", range(2, 9))
def test_vectors_side_by_side_are_packed_as_alone(bits, others):
    rng = np.random.default_rng(bits)
    first = rng.integers(0, 1 << bits, (2, 3, 48))
    second = rng.integers(0, 1 << others, (2, 3, 32))
    codes = mx.array(np.concatenate([first, second], axis=-1).astype(np.float32))
    packed = packing((48, bits), (32, others))(codes)
    alone = pack(mx.array(first), bits), pack(mx.array(second), others)
    assert (np.array(packed) == np.concatenate(alone, axis=-1)).all()


def test_codes_of_every_integer_type_pack_alike():
    codes = np.arange(64) % 8
    packed = [np.array(pack(mx.array(codes.astype(t)), 3)) for t in (np.uint8, np.int32, np.uint32)]
    assert (packed[0] == packed[1]).all() and (packed[0] == packed[2]).all()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="24 codes in a vector; a multiple of 16 is needed"):
        pack(mx.zeros((24,), mx.uint8), 4)
    with pytest.raises(ValueError, match="7 halfwords in a vector; a multiple of 3 is needed"):
        unpack(mx.zeros((7,), mx.uint16), 3)


def test_levels_lie_four_to_a_halfword():
    levels = mx.array([[1, 2, 3, 4, 15, 0, 9, 5, 7, 6]])
    halfwords = pack_levels(levels)
    assert halfwords.dtype == mx.uint16
    assert halfwords.tolist() == [[0x4321, 0x590F, 0x0067]]
    assert unpack_levels(halfwords, 10).tolist() == levels.tolist()
