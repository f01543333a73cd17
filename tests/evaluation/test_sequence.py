"""A sequence through pages gives mlx-lm's own logits."""

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.evaluation import sequence as sequence_module
from vllm_metal.evaluation.sequence import PagedSequence
from vllm_metal.metal_kernel_backend.dense import DensePages

TOKENS = [(7 * i + 3) % 60 for i in range(45)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model):
    return np.array(model(mx.array([TOKENS]))[0])


@pytest.fixture
def sequence(model, monkeypatch):
    monkeypatch.setattr(sequence_module, "PREFILL_CHUNK", 13)
    binding = ModelBinding(model)
    return PagedSequence(binding, [DensePages(s, 16, mx.float32) for s in binding.layers], 80)


def test_prefill_in_chunks(sequence, expected):
    logits = np.concatenate([np.array(chunk) for chunk in sequence.prefill(TOKENS)])
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_decode_at_positions_already_stored(sequence, expected):
    for _ in sequence.prefill(TOKENS):
        pass
    positions = [0, 15, 16, 44]
    logits = np.array(sequence.decode_at(TOKENS, positions))
    np.testing.assert_allclose(logits, expected[positions], atol=1e-3)


def test_greedy_leaves_the_sequence_as_it_was(sequence, model):
    for _ in sequence.prefill(TOKENS[:30]):
        pass
    first = sequence.greedy(TOKENS[30:33], 5)
    assert sequence.greedy(TOKENS[30:33], 5) == first
    tokens = list(TOKENS[:33])
    for token in first:
        assert token == mx.argmax(model(mx.array([tokens]))[0, -1]).item()
        tokens.append(token)
