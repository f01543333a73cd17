"""The loss that a server measures at start: nothing for dense pages, more for fewer bits."""

import logging
import math

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup import loss_check
from vllm_metal.startup.loss_check import (
    REFUSE_KLD,
    WARN_KLD,
    CompressionLoss,
    judge,
    measure_loss,
)

TOKENS = [(7 * i) % 90 for i in range(70)]
"""More than two pieces of logits."""


@pytest.fixture(scope="module")
def binding() -> ModelBinding:
    return ModelBinding(tiny_model("llama", head_dim=64))


def backends(binding: ModelBinding, pair: str | None):
    config = pair and TurboQuantConfig(parse_pair(pair), reproducible=True)
    constants = neutral_constants(binding.layers)
    return make_backends(binding.layers, 16, mx.float32, config, constants, binding.states)


def loss(binding: ModelBinding, pair: str | None) -> CompressionLoss:
    return measure_loss(binding, backends(binding, None), backends(binding, pair), TOKENS)


def test_dense_pages_lose_nothing(binding):
    assert loss(binding, None) == CompressionLoss(0.0, 1.0, len(TOKENS))


def test_fewer_bits_lose_more(binding):
    fine, coarse = loss(binding, "q8_0/q8_0"), loss(binding, "q3_0/q2_0")
    assert 0 < fine.kld < coarse.kld / 10
    assert fine.same_token >= coarse.same_token


def test_it_is_the_divergence_of_the_distributions(binding):
    """Against the definition, in double precision, on the model's own logits."""

    def log_probabilities(pair: str | None) -> np.ndarray:
        rows = loss_check._read(binding, backends(binding, pair), TOKENS)
        logits = np.array(rows.of(0, len(TOKENS)).astype(mx.float32), np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    dense, compressed = log_probabilities(None), log_probabilities("q3_0/q3_0")
    found = loss(binding, "q3_0/q3_0")
    expected = (np.exp(dense) * (dense - compressed)).sum(axis=-1).mean()
    assert found.kld == pytest.approx(expected, rel=1e-3)
    assert found.same_token == (dense.argmax(-1) == compressed.argmax(-1)).mean()


def test_every_layer_of_a_recurrent_model_is_read():
    binding = ModelBinding(tiny_model("jamba", head_dim=64))
    assert 0 <= loss(binding, "q3_0/q2_0").kld < 1


class Broken(DensePages):
    """Gives no number from the second token on."""

    def prefill(self, pages, chunk):
        outputs = super().prefill(pages, chunk)
        return mx.where(mx.arange(outputs.shape[1])[:, None] > 0, mx.nan, outputs)


def test_compressed_pages_without_numbers_lose_everything(binding):
    broken = [Broken(shape, 16, mx.float32) for shape in binding.layers]
    found = measure_loss(binding, backends(binding, None), broken, TOKENS)
    assert found.kld == math.inf and found.tokens == len(TOKENS)


def test_a_model_without_numbers_is_left_to_the_probe_of_its_logits(binding, caplog):
    broken = [Broken(shape, 16, mx.float32) for shape in binding.layers]
    found = measure_loss(binding, broken, broken, TOKENS)
    assert found.tokens == 1  # the token before the first that is none
    judge(CompressionLoss(0.0, 1.0, 0), "q8_0/q3_0", accepted=False)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("kld", "level"),
    [(0.0, logging.INFO), (0.99 * WARN_KLD, logging.INFO), (WARN_KLD, logging.WARNING)],
)
def test_what_is_said(caplog, kld, level):
    with caplog.at_level(logging.INFO, "vllm.metal.startup"):
        judge(CompressionLoss(kld, 0.875, 200), "q4_0/q3_0", accepted=False)
    [record] = caplog.records
    assert record.levelno == level
    assert f"{kld:.4f} nats" in record.message and "q4_0/q3_0" in record.message
    assert "87.5% of 200 tokens" in record.message


@pytest.mark.parametrize("kld", [REFUSE_KLD, math.inf])
def test_what_is_refused_may_be_accepted(caplog, kld):
    loss = CompressionLoss(kld, 0.3, 200)
    with pytest.raises(UserError, match="allowed: less than 0.5 nats.*allow_lossy"):
        judge(loss, "q4_0/q3_0", accepted=False)
    judge(loss, "q4_0/q3_0", accepted=True)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
