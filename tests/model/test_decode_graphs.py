"""A replayed decode step is the step itself: its logits, its pages, in place."""

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import FETCHED, SERVED, VOCABULARY, tiny_model
from vllm_metal.attention.metadata import DecodeMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata
from vllm_metal.kv_cache.groups import rounded_blocks
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model import decode_graphs
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import ModelBinding

BLOCK = 8
NUM_BLOCKS = 64
COMPRESSED = TurboQuantConfig(parse_pair("q8_0/q3_0"))
BY_DAY = ["llama", "qwen3_moe", "openelm", "minicpm3", "gemma4_shared"]
"""Plain, experts, other heads in each layer, keys and values of unequal sizes, shared layers.

The others are traced in this way at night, and many of them by the engines of `e2e/test_models`."""

KINDS = [
    *(
        pytest.param(name, None, id=name, marks=[] if name in BY_DAY else [pytest.mark.nightly])
        for name in (*SERVED, *(name for name in FETCHED if name != "gemma2"), "gemma4_shared")
    ),
    pytest.param("gemma4_shared", COMPRESSED, id="gemma4_shared-turboquant"),
    pytest.param("llama", COMPRESSED, id="llama-turboquant"),
    pytest.param("llama", TurboQuantConfig(parse_pair("q4_0/q2_0")), id="llama-few-bits"),
]


class Decoder:
    """A tiny model whose requests have random tokens in their pages, the null block rubbish."""

    def __init__(self, model_type="llama", turboquant=None, num_blocks=NUM_BLOCKS):
        self.binding = ModelBinding(tiny_model(model_type))
        constants = neutral_constants(self.binding.layers)
        backends = make_backends(self.binding.layers, BLOCK, mx.float32, turboquant, constants)
        self.kv_cache = KVCache(backends, num_blocks)
        self.model = self.binding.bind(self.kv_cache)
        rng = np.random.default_rng(0)
        self.blocks = rng.permutation(np.arange(1, num_blocks)).astype(np.int32)
        self.graphs = DecodeGraphs(self.model)

    def metadata(self, lens: list[int]) -> DecodeMetadata:
        """Requests of these lengths, each with blocks of its own."""
        most = -(-max(lens) // BLOCK)
        table = self.blocks[: len(lens) * most].reshape(len(lens), most)
        [metadata] = decode_metadata(self.kv_cache.groups, [table], np.array(lens, np.int32) - 1)
        return metadata

    def run(self, forward, lens: list[int], seed: int) -> mx.array:
        tokens = np.random.default_rng([seed, *lens]).integers(0, VOCABULARY, (len(lens), 1))
        logits = forward(mx.array(tokens), [self.metadata(lens)])
        mx.eval(logits, self.kv_cache.arrays)
        return logits


def difference(logits: mx.array, expected: mx.array) -> float:
    return (mx.abs(logits - expected).max() / mx.std(expected)).item()


def store_somewhere(decoder: Decoder, lens: list[int]) -> None:
    """Fills the pages of requests of `lens` with the tokens of earlier steps."""
    for length in range(1, max(lens)):
        decoder.run(decoder.model.forward, [min(length, n) for n in lens], seed=length)


@pytest.mark.parametrize(("model_type", "turboquant"), KINDS)
def test_every_kind_of_model(model_type, turboquant):
    assert_replay_is_the_step(Decoder(model_type, turboquant), [5, 1, 9])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v32", "stablelm"])
@pytest.mark.parametrize("lens", [[1], [9], [8, 3]], ids=str)
def test_models_that_attend_themselves_see_no_more_than_their_tokens(model_type, lens):
    """A trace gathers whole blocks, of one request as of many."""
    assert_replay_is_the_step(Decoder(model_type), lens)


@pytest.mark.parametrize("turboquant", [None, COMPRESSED], ids=["dense", "turboquant"])
@pytest.mark.parametrize("lens", [[1], [8], [9], [140, 139]], ids=str)
def test_lengths(turboquant, lens):
    assert_replay_is_the_step(Decoder(turboquant=turboquant), lens)


def assert_replay_is_the_step(decoder: Decoder, lens: list[int]) -> None:
    if max(lens) < 100:
        store_somewhere(decoder, lens)
    expected = decoder.run(decoder.model.forward, lens, seed=0)
    pages = [mx.array(array) for array in decoder.kv_cache.arrays]
    for _ in range(3):
        assert difference(decoder.run(decoder.graphs, lens, seed=0), expected) < 1e-4
    for array, before in zip(decoder.kv_cache.arrays, pages, strict=True):
        assert mx.allclose(array.astype(mx.float32), before.astype(mx.float32), atol=1e-4)


@pytest.mark.parametrize("turboquant", [None, COMPRESSED], ids=["dense", "turboquant"])
def test_the_number_of_drafts_belongs_to_the_shape(turboquant):
    """Two requests with three new tokens in all, of either; as if each token came by itself."""
    decoder, lens = Decoder(turboquant=turboquant), [12, 9]
    store_somewhere(decoder, lens)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, 1))
    table = decoder.blocks[:4].reshape(2, 2)
    for query_lens in ((2, 1), (1, 2)) * 3:
        new = [np.arange(n - count, n) for n, count in zip(lens, query_lens, strict=True)]
        positions, requests = np.concatenate(new).astype(np.int32), np.repeat([0, 1], query_lens)
        [apart] = decode_metadata(decoder.kv_cache.groups, [table[requests]], positions)
        expected = decoder.model.evaluate(mx.array(tokens), [apart])
        [told] = decode_metadata(decoder.kv_cache.groups, [table], positions, query_lens)
        logits = decoder.graphs(mx.array(tokens), [told])
        mx.eval(logits, decoder.kv_cache.arrays)
        assert difference(logits, expected) < 1e-4


def test_a_trace_serves_other_tokens_and_other_lengths():
    """Nothing of the traced step is kept but its operations."""
    decoder = Decoder()
    store_somewhere(decoder, [24, 24])
    for lens in ([17, 20], [17, 20], [24, 18], [19, 23]):
        expected = decoder.run(decoder.model.forward, lens, seed=1)
        assert difference(decoder.run(decoder.graphs, lens, seed=1), expected) < 1e-4
    assert len(decoder.graphs._graphs) == 1


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v32", "longcat_flash"])
def test_no_step_computes_arrays_without_elements(model_type):
    """Not even where a layer caches one array, whose values have none."""
    decoder = Decoder(model_type)
    arguments = mx.array([[3], [4]]), [decoder.metadata([5, 9])]
    assert decoder.graphs.empty_operations(*arguments) == []
    expected = decoder.run(decoder.model.forward, [5, 9], seed=0)
    assert difference(decoder.run(decoder.graphs, [5, 9], seed=0), expected) < 1e-4


def test_operations_on_arrays_without_elements_are_named(monkeypatch):
    decoder = Decoder()
    forward = decoder.model.forward

    def with_nothing(*arguments):
        logits = forward(*arguments)
        nothing = logits[..., :0]
        return mx.concatenate([logits, nothing * 2 + 1, nothing], axis=-1)

    monkeypatch.setattr(decoder.model, "forward", with_nothing)
    found = decoder.graphs.empty_operations(mx.array([[3]]), [decoder.metadata([5])])
    assert sorted(found) == ["Add", "Multiply"]


def test_lazy_tokens_go_in():
    decoder = Decoder()
    for _ in range(3):
        lazy = mx.argmax(mx.array([[0, 0, 0, 1.0]]), axis=-1)[:, None]
        logits = decoder.graphs(lazy, [decoder.metadata([5])])
        expected = decoder.model.forward(mx.array([[3]]), [decoder.metadata([5])])
        assert difference(logits, expected) < 1e-4


def test_the_padding_of_the_table_is_not_seen():
    """17 blocks are rounded up to 18; block 0 holds what would change every logit."""
    decoder = Decoder()
    taken = decoder.kv_cache.take()
    full = [mx.full(array.shape, 99.0) for array in taken.regions]
    decoder.kv_cache.put(taken._replace(regions=full))
    assert rounded_blocks(17) == 18
    expected = decoder.run(decoder.model.forward, [17 * BLOCK], seed=2)
    for _ in range(2):
        assert difference(decoder.run(decoder.graphs, [17 * BLOCK], seed=2), expected) < 1e-4


@pytest.mark.parametrize("turboquant", [None, COMPRESSED], ids=["dense", "turboquant"])
def test_pages_are_written_in_place(turboquant):
    """Over many replays the peak stays far below a second copy of the pages."""
    decoder = Decoder(turboquant=turboquant, num_blocks=20_000)
    for step in range(3):
        decoder.run(decoder.graphs, [9, 12], step)
    mx.reset_peak_memory()
    for step in range(10):
        decoder.run(decoder.graphs, [9, 12], step)
    smallest = min(array.nbytes for array in decoder.kv_cache.arrays)
    assert mx.get_peak_memory() - mx.get_active_memory() < smallest / 2


def test_few_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(decode_graphs, "MAX_GRAPHS", 2)
    decoder = Decoder()
    for lens in ([1], [9], [17], [9], [25], [9]):
        decoder.run(decoder.graphs, lens, seed=3)
    assert set(decoder.graphs._graphs) == {((), (1, 4)), ((), (1, 2))}


def test_a_failed_trace_loses_no_page():
    decoder = Decoder()
    before = decoder.kv_cache.arrays
    decoder.run(decoder.graphs, [3], seed=0)
    decoder.binding.model.model.norm = lambda x: x * x.sum().item()
    with pytest.raises(ValueError, match="eval"):
        decoder.graphs(mx.array([[1]]), [decoder.metadata([3])])
    assert [array.shape for array in decoder.kv_cache.arrays] == [a.shape for a in before]
    mx.eval(decoder.kv_cache.arrays)


def test_rounding_of_blocks():
    for num_blocks in range(1, 3000):
        rounded = rounded_blocks(num_blocks)
        assert num_blocks <= rounded <= num_blocks * 9 / 8
        assert rounded_blocks(rounded) == rounded
    assert len({rounded_blocks(n) for n in range(1, 1025)}) < 80
