"""The committed measurements are complete and are read, not typed in."""

import pytest

from vllm_metal.metal_kernel_backend.turboquant import measured_loss
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS


@pytest.mark.parametrize("pair", measured_loss.FORMAT_PAIRS, ids="/".join)
def test_every_shown_pair_exists_and_is_measured(pair):
    k_quant, v_quant = pair
    assert k_quant in KEY_FORMATS and v_quant in VALUE_FORMATS
    loss = measured_loss.measured_loss(k_quant, v_quant)
    assert 0 < loss.kld < 1
    assert 0.9 < loss.perplexity_ratio < 2
    assert "KLD" in str(loss) and loss.model in str(loss)


def test_a_pair_without_measurement_has_none():
    assert measured_loss.measured_loss("int2", "q2_0") is None


@pytest.mark.parametrize(
    ("pair", "warned"),
    [
        (("q8_0", "q3_0"), False),
        (("q5_0", "q3_0"), False),
        (("q4_0", "q4_0"), True),
        (("q8_0", "q2_0"), True),
        (("int2", "q4_0"), True),
    ],
)
def test_few_bits_are_warned_about(pair, warned):
    text = measured_loss.warning(*pair)
    assert (text is not None) is warned
    if warned:
        assert "KLD" in text or "not measured" in text
