"""The formats that ours are measured beside read back as they are defined."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.errors import UserError
from vllm_metal.evaluation.block_affine import BlockAffine, parse_bits

SHAPE = LayerShape(1, 64, 64)


def vectors(seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=(200, 1, 64)).astype(np.float32))


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_keys_are_within_a_step_of_their_block(bits):
    keys = vectors()
    error = np.abs(np.array(BlockAffine(SHAPE, 16, bits, 3).read_keys(keys) - keys))
    blocks = np.array(keys).reshape(200, 2, 32)
    step = (blocks.max(-1) - blocks.min(-1)) / (2**bits - 1)
    assert (error.reshape(200, 2, 32).max(-1) <= 1.05 * step).all()


def test_values_have_the_lloyd_max_error():
    values = vectors(1)
    for bits, distortion in ((2, 0.1175), (3, 0.0345), (4, 0.0095)):
        error = BlockAffine(SHAPE, 16, 8, bits).read_values(values) - values
        relative = (mx.sum(error * error) / mx.sum(values * values)).item()
        assert relative == pytest.approx(distortion, rel=0.12)


def test_bits_include_scales_and_zero_points():
    assert BlockAffine(SHAPE, 16, 8, 3).bits_per_element == 12.5 / 2


def test_a_head_size_that_blocks_do_not_divide():
    for shape in (LayerShape(1, 80, 64), LayerShape(1, 64, 80)):
        with pytest.raises(UserError, match="head size 80; 32 must divide it"):
            BlockAffine(shape, 16, 8, 3)


def test_bits_as_text():
    assert parse_bits("8/3") == (8, 3)
    for wrong in ("", "8", "8/", "/3", "8/3/3", "9/3", "1/3", "8/7", "x/y", " 8/3", "8/-3"):
        with pytest.raises(ValueError, match="keys 2, 3, 4, 5, 6, 7, 8; values 2, 3, 4, 5, 6, 8"):
            parse_bits(wrong)
