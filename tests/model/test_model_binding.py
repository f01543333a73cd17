"""Unmodified mlx-lm models through paged attention: the logits of mlx-lm's own caches."""

import gc
import io
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import cache as mlx_lm_cache

from tests.tiny_models import FETCHED, LAYERS, ONE_AT_A_TIME, SERVED, SHARED, VOCABULARY, tiny_model
from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.errors import ChangedLibraryError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference
from vllm_metal.model import model_binding
from vllm_metal.model.dry_forward import UnsupportedModelError
from vllm_metal.model.layer_cache import LayerKVCache
from vllm_metal.model.model_binding import ModelBinding

BLOCK = 8
PROMPT_LENGTHS = (3, 19, 8)
CHUNK = 11
DECODE_STEPS = 4
TOLERANCE = 3e-5
"""Largest difference of logits, in standard deviations of the logits."""

ROW_BY_ROW = {*ONE_AT_A_TIME, "afm7", "gemma2"}
"""Architectures whose decode runs one request at a time; see `startup/decode_probe.py`."""


def dense(shape: LayerShape) -> AttentionBackend:
    return DensePages(shape, BLOCK, mx.float32)


class Engine:
    """A bound model and the block tables of some requests."""

    def __init__(self, model, num_requests: int = len(PROMPT_LENGTHS), backend=dense):
        self.binding = ModelBinding(model)
        blocks_each = 4
        backends = [backend(shape) for shape in self.binding.layers]
        self.kv_cache = KVCache(backends, 1 + num_requests * blocks_each)
        self.model = self.binding.bind(self.kv_cache)
        ids = np.random.default_rng(0).permutation(np.arange(1, 1 + num_requests * blocks_each))
        self.table = ids.reshape(num_requests, blocks_each).astype(np.int32)

    def prefill(self, request: int, token_ids, context_len: int, all_rows=False) -> mx.array:
        groups = self.kv_cache.groups
        tables = [self.table[request]] * len(groups)
        metadata = prefill_metadata(groups, tables, context_len, len(token_ids))
        return self.model.evaluate(mx.array(token_ids)[None], metadata, all_rows)[0]

    def decode(self, token_ids, lens, requests=(0, 1, 2)) -> mx.array:
        """One new token for each request; `lens` counts it in. Logits [B, vocabulary]."""
        groups = self.kv_cache.groups
        tables = [self.table[list(requests)]] * len(groups)
        metadata = decode_metadata(groups, tables, np.array(lens, np.int32) - 1)
        return self.model.evaluate(mx.array(token_ids)[:, None], metadata)[:, -1]

    def decode_row_by_row(self, token_ids, lens) -> mx.array:
        steps = zip(token_ids, lens, strict=True)
        return mx.concatenate([self.decode([t], [n], [r]) for r, (t, n) in enumerate(steps)])


def difference(logits: mx.array, expected: mx.array) -> float:
    return (mx.abs(logits - expected).max() / mx.std(expected)).item()


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def test_a_chunk_is_not_copied_to_lose_its_axis_of_rows():
    """MLX takes an index for a gather. The embedding gathers, and nothing else of this chunk."""
    engine = Engine(tiny_model("llama"))
    metadata = prefill_metadata(engine.kv_cache.groups, engine.table[:1], 0, CHUNK)
    graph = io.StringIO()
    mx.export_to_dot(graph, engine.model.forward(mx.zeros((1, CHUNK), mx.int32), metadata))
    assert graph.getvalue().count('"Gather"') == 1


def run(engine: Engine, sequences: list[list[int]], row_by_row: bool) -> list[mx.array]:
    """Logits of every token: prompts in chunks, then decode steps of all requests."""
    logits = [[] for _ in sequences]
    for request, (sequence, length) in enumerate(zip(sequences, PROMPT_LENGTHS, strict=True)):
        for start in range(0, length, CHUNK):
            chunk = sequence[start : min(start + CHUNK, length)]
            logits[request].append(engine.prefill(request, chunk, start, all_rows=True))
    for step in range(DECODE_STEPS):
        lens = [length + step + 1 for length in PROMPT_LENGTHS]
        newest = [s[n - 1] for s, n in zip(sequences, lens, strict=True)]
        rows = (engine.decode_row_by_row if row_by_row else engine.decode)(newest, lens)
        for request, row in enumerate(rows):
            logits[request].append(row[None])
    return [mx.concatenate(parts) for parts in logits]


def requests() -> list[list[int]]:
    return [tokens(i, n + DECODE_STEPS) for i, n in enumerate(PROMPT_LENGTHS)]


def own_logits(model, sequence: list[int], length: int) -> mx.array:
    """mlx-lm's own, cut where `run` cuts: some models mean the cuts."""
    cache = mlx_lm_cache.make_prompt_cache(model)
    cuts = [*range(0, length, CHUNK), *range(length, len(sequence) + 1)]
    chunks = [sequence[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return mx.concatenate([model(mx.array([chunk]), cache=cache)[0] for chunk in chunks])


@pytest.mark.parametrize("model_type", [*SERVED, *ONE_AT_A_TIME, *FETCHED, *SHARED])
def test_logits_are_those_of_mlx_lms_own_caches(model_type):
    model = tiny_model(model_type)
    expected = [own_logits(model, s, n) for s, n in zip(requests(), PROMPT_LENGTHS, strict=True)]
    logits = run(Engine(model), requests(), model_type in ROW_BY_ROW)
    for found, own in zip(logits, expected, strict=True):
        assert difference(found, own) < TOLERANCE


def turboquant(shape: LayerShape) -> AttentionBackend:
    constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
    formats = parse_pair("q8_0/q8_0")
    return TurboQuantReference(shape, BLOCK, formats, constants, reproducible=True)


@pytest.mark.parametrize(
    ("model_type", "loss"),
    [
        ("gemma4_shared", 0.25),
        ("gemma2", 0.25),
        ("stablelm", 0.15),
        ("afm7", 0.5),  # rounds its own keys and values to integers
    ],
)
def test_compressed_pages_serve_shared_and_fetched_layers(model_type, loss):
    """Close to dense but not it, so they are read; a batch gives what its requests give."""
    model = tiny_model(model_type)
    logits = run(Engine(model, backend=turboquant), requests(), model_type in ROW_BY_ROW)
    alone = logits
    if model_type not in ROW_BY_ROW:
        alone = run(Engine(model, backend=turboquant), requests(), row_by_row=True)
    exact = run(Engine(model), requests(), row_by_row=True)
    for found, solo, wanted in zip(logits, alone, exact, strict=True):
        assert difference(found, solo) < 0.02  # rounding moves a few codes by one
        assert 1e-3 < difference(found, wanted) < loss


@pytest.mark.parametrize("model_type", [*SERVED, *FETCHED, *SHARED])
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


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("openelm", [LayerShape(heads, 32, 32) for heads in (2, 2, 4, 4)]),
        ("minicpm3", [LayerShape(4, 48, 32)] * LAYERS),
        ("deepseek_v3", [LayerShape(1, 32, 16, fetched=True)] * LAYERS),
        ("deepseek_v32", [LayerShape(1, 32, 16, True), LayerShape(1, 32, 0, True)] * LAYERS),
        ("longcat_flash", [LayerShape(1, 32, 16, fetched=True)] * 4),
        ("gemma2", [LayerShape(2, 32, 32, fetched=True)] * LAYERS),
        ("gemma4_shared", [LayerShape(1, 64, 64)] * 2),
        ("afm7", [LayerShape(2, 32, 32)] * 2),
    ],
)
def test_a_layer_is_what_the_model_caches(model_type, layers):
    """Heads and sizes of each layer's own; layers that share have none."""
    assert ModelBinding(tiny_model(model_type)).layers == layers


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma4_text"])
def test_no_cache_outlives_its_forward(model_type, monkeypatch):
    """Or pages that a lazy read still holds are copied by the next write."""
    made = []

    class Watched(LayerKVCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(model_binding, "LayerKVCache", Watched)
    engine = Engine(tiny_model(model_type), num_requests=1)
    gc.disable()
    try:
        engine.prefill(0, tokens(1, 12), 0)
        assert made and all(cache() is None for cache in made)
    finally:
        gc.enable()


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


def test_unservable_models_are_refused_with_the_reason():
    model = tiny_model("llama")
    model.make_cache = lambda: [mlx_lm_cache.ChunkedKVCache(8) for _ in model.layers]
    with pytest.raises(UnsupportedModelError) as refusal:
        ModelBinding(model)
    assert "Model type 'llama' cannot be served" in str(refusal.value)
    assert refusal.value.reasons[0] == "layer 0 needs chunked attention"


def other_arguments(q, k, v, scale):
    return q


@pytest.mark.parametrize(
    ("replacement", "change"),
    [(None, "it does not exist"), (other_arguments, "its parameters are ['q', 'k', 'v', 'scale']")],
)
def test_an_mlx_lm_with_another_attention_is_named(monkeypatch, replacement, change):
    monkeypatch.setattr(model_binding, "_mlx_lm_attention", replacement)
    with pytest.raises(ChangedLibraryError, match="mlx-lm .*base.scaled_dot_product") as error:
        ModelBinding(tiny_model("llama"))
    assert error.value.reasons[0].startswith(change)
