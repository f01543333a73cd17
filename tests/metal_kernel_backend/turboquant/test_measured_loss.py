"""The committed measurements are complete and are read, not typed in."""

import pytest

from vllm_metal.metal_kernel_backend.turboquant import measured_loss
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair


@pytest.mark.parametrize("pair", measured_loss.SHOWN_PAIRS, ids=str)
def test_every_shown_pair_is_measured(pair):
    loss = measured_loss.measured_loss(pair)
    assert 0 < loss.kld < 1
    assert 0.9 < loss.perplexity_ratio < 2
    assert "KLD" in str(loss) and loss.model in str(loss)


def test_shown_pairs_go_from_most_to_fewest_bits():
    bits = [sum(format.bits for format in pair) for pair in measured_loss.SHOWN_PAIRS]
    assert bits == sorted(bits, reverse=True)
    assert len(set(measured_loss.SHOWN_PAIRS)) == len(measured_loss.SHOWN_PAIRS)


def test_a_pair_without_measurement_has_none():
    assert measured_loss.measured_loss(parse_pair("int2/q2_0")) is None


@pytest.mark.parametrize(
    ("pair", "warned"),
    [
        ("q8_0/q3_0", False),
        ("q5_0/q3_0", False),
        ("q4_0/q4_0", True),
        ("q8_0/q2_0", True),
        ("int2/q4_0", True),
    ],
)
def test_few_bits_are_warned_about(pair, warned):
    text = measured_loss.warning(parse_pair(pair))
    assert (text is not None) is warned
    if warned:
        assert "KLD" in text or "has not been measured" in text
