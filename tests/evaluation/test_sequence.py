"""A sequence through pages gives mlx-lm's own logits."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.tiny_models import RECURRENT, WINDOWED, tiny_model
from vllm_metal.evaluation import sequence as sequence_module
from vllm_metal.evaluation.sequence import PagedSequence
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.model_binding import ModelBinding

COMPRESSED = TurboQuantConfig(parse_pair("q8_0/q8_0"))
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


@pytest.mark.parametrize(
    ("model_type", "turboquant"),
    [(kind, None) for kind in (*WINDOWED, *RECURRENT)]
    + [(kind, COMPRESSED) for kind in (*WINDOWED, *RECURRENT) if kind != "mamba"],
    ids=str,
)
def test_every_kind_of_layer(model_type, turboquant, monkeypatch):
    """Chunks shorter than a window, decode at the end, at other positions, and after all."""
    monkeypatch.setattr(sequence_module, "PREFILL_CHUNK", 13)
    model = tiny_model(model_type)
    binding = ModelBinding(model)
    constants = neutral_constants(binding.layers)
    backends = make_backends(binding.layers, 8, mx.float32, turboquant, constants, binding.states)
    sequence = PagedSequence(binding, backends, 80)
    own = model(mx.array([TOKENS]), cache=make_prompt_cache(model))[0]
    scale = mx.std(own).item()

    errors: list[float] = []

    def compare(logits: mx.array, positions: list[int]) -> None:
        rows = mx.abs(logits - own[mx.array(positions)]).max(axis=-1) / scale
        errors.extend(rows.tolist())

    compare(mx.concatenate(list(sequence.prefill(TOKENS[:40]))), list(range(40)))
    for position in range(40, 44):
        compare(sequence.decode_at(TOKENS, [position]), [position])
    compare(sequence.decode_at(TOKENS, [3, 20, 43]), [3, 20, 43])
    compare(sequence.decode_at(TOKENS, [44]), [44])
    if turboquant is None:
        assert max(errors) < 1e-4
    else:  # the codec's error may send a token to another expert
        assert np.median(errors) < 0.15


def test_greedy_restores_the_recurrent_state():
    model = tiny_model("jamba")
    binding = ModelBinding(model)
    backends = make_backends(binding.layers, 8, mx.float32, None, list, binding.states)
    sequence = PagedSequence(binding, backends, 80)
    for _ in sequence.prefill(TOKENS[:30]):
        pass
    first = sequence.greedy(TOKENS[30:33], 5)
    assert sequence.greedy(TOKENS[30:33], 5) == first
    assert first[0] == mx.argmax(model(mx.array([TOKENS[:33]]))[0, -1]).item()
