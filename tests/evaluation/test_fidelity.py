"""Fidelity is zero for the reference itself and grows with fewer bits."""

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.evaluation.block_affine import BlockAffine
from vllm_metal.evaluation.fidelity import compare
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference
from vllm_metal.model.model_binding import ModelBinding

WINDOWS = [[(11 * i + j) % 60 for i in range(70)] for j in (0, 5)]


@pytest.fixture(scope="module")
def results():
    binding = ModelBinding(tiny_model("llama", head_dim=64, num_key_value_heads=2))

    def compressed(k_quant, v_quant):
        formats = parse_pair(f"{k_quant}/{v_quant}")
        return lambda: [
            TurboQuantReference(
                s, 16, formats, KeyConstants.neutral(s.num_kv_heads, s.head_size), True
            )
            for s in binding.layers
        ]

    def dense():
        return [DensePages(s, 16, mx.float32) for s in binding.layers]

    candidates = {
        "dense": dense,
        "q8_0/q8_0": compressed("q8_0", "q8_0"),
        "q4_0/q4_0": compressed("q4_0", "q4_0"),
        "q3_0/q2_0": compressed("q3_0", "q2_0"),
        "affine 8/3": lambda: [BlockAffine(s, 16, 8, 3) for s in binding.layers],
        "affine 3/2": lambda: [BlockAffine(s, 16, 3, 2) for s in binding.layers],
    }
    fidelity, perplexity = compare(binding, dense(), candidates, WINDOWS, lambda what: None)
    assert perplexity > 1
    return {name: figures.summary() for name, figures in fidelity.items()}


def test_the_reference_loses_nothing(results):
    assert results["dense"]["kld"] == pytest.approx(0, abs=1e-6)
    assert results["dense"]["decode_kld"] == pytest.approx(0, abs=1e-6)
    assert results["dense"]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert results["dense"]["top1_agreement"] == 1


def test_fewer_bits_lose_more(results):
    losses = [results[name]["kld"] for name in ("q8_0/q8_0", "q4_0/q4_0", "q3_0/q2_0")]
    assert losses == sorted(losses) and losses[0] > 0
    assert results["affine 3/2"]["kld"] > results["affine 8/3"]["kld"] > 0


def test_the_decode_path_loses_about_what_the_prefill_path_does(results):
    for name in ("q4_0/q4_0", "q3_0/q2_0"):
        assert results[name]["decode_kld"] == pytest.approx(results[name]["kld"], rel=0.6)
        assert np.isfinite(results[name]["kld_standard_error"])
