"""One owner of the figures: what the worker, `/metrics` and `vllm-metal plan` ask."""

import mlx.core as mx
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.selection import neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model_pages import ModelPages

FULL = LayerShape(2, 64, 64)
WINDOW = LayerShape(2, 64, 64, sliding_window=32)
STATE = StateShape(((50, 100),), (mx.float32,))
TURBOQUANT = {"turboquant": True, "k_quant": "q8_0", "v_quant": "q3_0"}


@pytest.fixture
def compressing(make_config):
    """A configuration; the model has no tokenizer, which TurboQuant needs to serve."""
    config = make_config()
    config.additional_config = TURBOQUANT
    return config


def cache_of(config, layers, states=()) -> ModelPages:
    return ModelPages.of(config, layers, states, neutral_constants(layers))


def test_pages_are_what_the_configuration_asks_for(compressing):
    with pytest.raises(UserError, match="cannot compress"):
        cache_of(compressing, [LayerShape(1, 12, 12)])
    compressing.additional_config = TURBOQUANT | {"skip_layers": [0]}
    cache = cache_of(compressing, [FULL] * 3)
    assert [backend.compressed for backend in cache.backends] == [False, True, True]
    assert cache.backends[0].dtype == mx.float32
    assert {backend.format_names for backend in cache.backends[1:]} == {("q8_0", "q3_0")}


def test_layers_alone_have_their_own_ratio(compressing):
    cache = cache_of(compressing, [FULL] * 3)
    assert cache.ratio(128) == 256 / 92
    assert cache.capacity(10**6, 128).bytes_for(16) == 3 * 16 * 2 * 92
    assert cache.dense_capacity(10**6, 128).bytes_for(16) == 3 * 16 * 2 * 256


def test_a_state_has_a_part_in_the_ratio(compressing):
    """It takes a page of its own, compressed layers or not."""
    with_state = cache_of(compressing, [FULL] * 2, [STATE])
    assert 1 < with_state.ratio(128) < cache_of(compressing, [FULL] * 2).ratio(128)


def test_windows_are_counted_by_what_they_hold(make_config):
    cache = cache_of(make_config(max_num_batched_tokens=16), [FULL, WINDOW])
    blocks = cache.capacity(0, 10_000)
    assert blocks.blocks_for(10_000) < 2 * 10_000 // 16


def test_no_engine_and_no_model_is_needed(make_config):
    """As in `vllm-metal plan`, and in the process of `/metrics`: vLLM has settled no layout."""
    config = make_config()
    config.model_config = None
    assert config.cache_config.kv_cache_layout is None
    pages = mx.float16, TurboQuantConfig(parse_pair("q8_0/q3_0")), neutral_constants([FULL])
    assert ModelPages.with_pages(config, [FULL], [], *pages).ratio(100) == 256 / 92
    assert config.cache_config.kv_cache_layout is None


@pytest.mark.parametrize(
    "settings", [{}, {"skip_layers": [0]}], ids=["all compressed", "one dense"]
)
@pytest.mark.parametrize("state", [STATE, StateShape(((500, 100),), (mx.float32,))], ids=str)
def test_states_are_kept_at_the_ends_of_the_smallest_block(compressing, settings, state):
    """vLLM's scheduler ends chunks there; at any other place it would serve wrong states."""
    compressing.additional_config = TURBOQUANT | settings
    compressing.cache_config.mamba_cache_mode = "align"
    pages = cache_of(compressing, [FULL] * 3, [state] * 2)
    smallest = min(backend.block_size for backend in pages.backends)
    specs = pages.specs(4096)
    assert {specs[f"states.{i}"].block_size for i in range(2)} == {smallest}
    assert min(spec.block_size for spec in specs.values()) == smallest
    assert pages.match_unit == pages.match_tokens
    assert smallest % pages.match_unit == 0 and 8 <= pages.match_unit <= 64


def test_where_prefixes_are_found(make_config):
    config = make_config()
    assert cache_of(config, [FULL], [STATE]).match_tokens is None  # states are not kept
    config.cache_config.mamba_cache_mode = "align"
    assert cache_of(config, [FULL]).match_tokens is None  # no states
    window = cache_of(config, [FULL, WINDOW], [STATE])
    assert window.match_unit is None and window.match_tokens == window.state_block_size
    alone = cache_of(config, [], [STATE])
    assert (alone.match_unit, alone.match_tokens, alone.state_block_size) == (None, 16, 16)
    config.cache_config.prefix_match_unit = 24
    given = cache_of(config, [FULL], [STATE])
    assert (given.match_unit, given.match_tokens) == (24, 24) and given.state_block_size % 24 == 0
