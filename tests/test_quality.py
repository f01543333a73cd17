"""The committed measurements are complete and are read, not typed in."""

import pytest

from vllm_metal import quality
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS


@pytest.mark.skipif(not quality.RESULTS.exists(), reason="no measurement is committed yet")
@pytest.mark.parametrize("pair", quality.FORMAT_PAIRS, ids="/".join)
def test_every_shown_pair_exists_and_is_measured(pair):
    k_quant, v_quant = pair
    assert k_quant in KEY_FORMATS and v_quant in VALUE_FORMATS
    loss = quality.measured_loss(k_quant, v_quant)
    assert 0 < loss.kld < 1
    assert 0.9 < loss.perplexity_ratio < 2
    assert "KLD" in str(loss) and loss.model in str(loss)


def test_a_pair_without_measurement_has_none():
    assert quality.measured_loss("int2", "q2_0") is None
