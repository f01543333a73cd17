"""Unmodified mlx-lm models through paged attention: the logits of mlx-lm's own caches."""

import pickle

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import cache as mlx_lm_cache

from tests.tiny_models import LAYERS, SERVED, VOCABULARY, tiny_model
from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.attention.model_binding import ModelBinding, UnsupportedModelError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense import DensePages

BLOCK = 8
PROMPT_LENGTHS = (3, 19, 8)
CHUNK = 11
DECODE_STEPS = 4
TOLERANCE = 1e-4
"""Largest difference of logits, in standard deviations of the logits."""

OWN_ATTENTION = "its attention is computed in another way"


class Engine:
    """A bound model and the block tables of some requests."""

    def __init__(self, model, num_requests: int = len(PROMPT_LENGTHS)):
        self.binding = ModelBinding(model)
        blocks_each = 4
        backends = [DensePages(shape, BLOCK, mx.float32) for shape in self.binding.layers]
        self.kv_cache = KVCache(backends, 1 + num_requests * blocks_each)
        self.binding.bind(self.kv_cache)
        ids = np.random.default_rng(0).permutation(np.arange(1, 1 + num_requests * blocks_each))
        self.table = ids.reshape(num_requests, blocks_each).astype(np.int32)

    def prefill(self, request: int, token_ids, context_len: int, all_rows=False) -> mx.array:
        positions = np.arange(context_len, context_len + len(token_ids))
        metadata = PrefillMetadata(
            block_table=mx.array(self.table[request][None]),
            slot_mapping=mx.array(self._slots(request, positions)),
            context_len=context_len,
            query_len=len(token_ids),
        )
        return self._run(mx.array(token_ids)[None], metadata, all_rows)[0]

    def decode(self, token_ids, lens) -> mx.array:
        """One new token for each request; `lens` counts it in. Logits [B, vocabulary]."""
        slots = [self._slots(r, np.array([n - 1]))[0] for r, n in enumerate(lens)]
        metadata = DecodeMetadata(
            block_table=mx.array(self.table[: len(lens)]),
            seq_lens=mx.array(lens, mx.int32),
            slot_mapping=mx.array(np.array(slots)),
            offset=mx.array(lens, mx.int32) - 1 if len(lens) > 1 else lens[0] - 1,
            max_seq_len=max(lens),
        )
        return self._run(mx.array(token_ids)[:, None], metadata)[:, -1]

    def _slots(self, request: int, positions: np.ndarray) -> np.ndarray:
        return (self.table[request][positions // BLOCK] * BLOCK + positions % BLOCK).astype(
            np.int32
        )

    def _run(self, token_ids, metadata, all_rows=False) -> mx.array:
        logits = self.binding.forward(token_ids, metadata, all_rows)
        mx.eval(logits, self.kv_cache.arrays)
        return logits


def difference(logits: mx.array, expected: mx.array) -> float:
    return (mx.abs(logits - expected).max() / mx.std(expected)).item()


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


@pytest.mark.parametrize("model_type", SERVED)
def test_logits_are_those_of_mlx_lms_own_caches(model_type):
    """Prompts in two chunks each, then decode steps of all requests as one `(B, 1)` forward."""
    model = tiny_model(model_type)
    sequences = [tokens(i, n + DECODE_STEPS) for i, n in enumerate(PROMPT_LENGTHS)]
    own = [model(mx.array([s]), cache=mlx_lm_cache.make_prompt_cache(model))[0] for s in sequences]
    mx.eval(own)

    engine = Engine(model)
    for request, (sequence, length) in enumerate(zip(sequences, PROMPT_LENGTHS, strict=True)):
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            logits = engine.prefill(request, sequence[start:end], start, all_rows=True)
            assert difference(logits, own[request][start:end]) < TOLERANCE
    for step in range(DECODE_STEPS):
        lens = [length + step + 1 for length in PROMPT_LENGTHS]
        newest = [s[n - 1] for s, n in zip(sequences, lens, strict=True)]
        expected = mx.stack([o[n - 1] for o, n in zip(own, lens, strict=True)])
        assert difference(engine.decode(newest, lens), expected) < TOLERANCE


@pytest.mark.parametrize("model_type", SERVED)
def test_the_head_on_the_last_row_only_gives_the_same_logits(model_type):
    engine = Engine(tiny_model(model_type), num_requests=1)
    assert engine.binding.slices_before_head
    every_row = engine.prefill(0, tokens(1, 12), 0, all_rows=True)
    assert every_row.shape == (12, VOCABULARY)
    last_row = engine.prefill(0, tokens(1, 12), 0)
    assert last_row.shape == (1, VOCABULARY)
    assert difference(last_row, every_row[-1:]) < TOLERANCE


def test_layer_shapes_are_read_off_the_model():
    binding = ModelBinding(tiny_model("qwen3", head_dim=32, num_key_value_heads=1))
    assert binding.layers == [LayerShape(1, 32, 32)] * LAYERS
    assert binding.model_type == "qwen3"


def test_mlx_lms_own_caches_still_work_after_binding():
    """The rebound function leaves other caches to mlx-lm, in a bound model and in later ones."""
    model = tiny_model("llama")
    token_ids = mx.array([tokens(0, 9)])
    before = model(token_ids, cache=mlx_lm_cache.make_prompt_cache(model))
    mx.eval(before)
    Engine(model).prefill(0, tokens(1, 5), 0, all_rows=True)
    after = model(token_ids, cache=mlx_lm_cache.make_prompt_cache(model))
    assert mx.array_equal(before, after)
    assert mx.array_equal(before[0], tiny_model("llama")(token_ids)[0])


def test_a_second_binding_finds_the_name_already_rebound():
    ModelBinding(tiny_model("llama"))
    rebound = mlx_lm_base.scaled_dot_product_attention
    engine = Engine(tiny_model("qwen2"), num_requests=1)
    assert mlx_lm_base.scaled_dot_product_attention is rebound
    model = tiny_model("qwen2")
    own = model(mx.array([tokens(3, 10)]))[0]
    assert difference(engine.prefill(0, tokens(3, 10), 0, all_rows=True), own) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3_text", "layer 0 needs sliding-window attention"),
        ("gpt_oss", "layer 0 needs sliding-window attention"),
        ("mamba", "layer 0 needs recurrent state"),
        ("qwen3_next", "layer 0 needs recurrent state"),
        ("stablelm", "layer 0 attends to other keys or values than its cache returned"),
        pytest.param("deepseek_v3", OWN_ATTENTION),
        pytest.param("gemma2", OWN_ATTENTION),
    ],
)
def test_unservable_models_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(UnsupportedModelError) as refusal:
        ModelBinding(tiny_model(model_type))
    assert f"Model type {model_type!r} cannot be served" in str(refusal.value)
    assert any(reason in line for line in refusal.value.reasons)


def test_a_refusal_is_short():
    with pytest.raises(UnsupportedModelError) as refusal:
        ModelBinding(tiny_model("mamba", num_hidden_layers=30))
    assert refusal.value.reasons[-1] == "and 26 more like these"
    assert len(refusal.value.reasons) == 5


def test_a_refusal_survives_the_way_between_processes():
    error = UnsupportedModelError("mamba", ["layer 0 needs recurrent state"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
