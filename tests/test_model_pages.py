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
