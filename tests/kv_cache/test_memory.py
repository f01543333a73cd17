"""The bytes that vLLM's planner spends are the bytes that MLX holds, for real models' layers.

Shapes are those of the published configurations; no weights are needed.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import pytest
import torch
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_max_concurrency_for_kv_cache_config,
)

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import StateGroup
from vllm_metal.kv_cache.spec import (
    KV_CACHE_LAYOUT,
    block_table_sizes,
    cache_layout,
    capacity,
    kv_cache_specs,
)
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair

BFLOAT16, FLOAT32 = mx.bfloat16, mx.float32


@dataclass(frozen=True)
class Model:
    """The layers of a model, in order."""

    name: str
    layers: list[LayerShape]
    states: list[StateShape] = field(default_factory=list)
    compressible: bool = True

    def __str__(self) -> str:
        return self.name


def every(period: int, count: int, last: LayerShape, others: LayerShape) -> list[LayerShape]:
    """`count` layers, each `period`th of them `last`."""
    return [last if (i + 1) % period == 0 else others for i in range(count)]


def delta_net(heads: int, key_size: int, value_size: int, channels: int) -> StateShape:
    """Gated delta net: three positions of a convolution, and a matrix for each head."""
    return StateShape(((3, channels), (heads, value_size, key_size)), (BFLOAT16, FLOAT32))


def mamba(width: int, state: int) -> StateShape:
    return StateShape(((3, width), (width, state)), (BFLOAT16, FLOAT32))


LATENT = LayerShape(1, 512, 64, fetched=True)
MODELS = [
    Model("Llama-3.1-8B", [LayerShape(8, 128, 128)] * 32),
    Model("Qwen3-30B-A3B", [LayerShape(4, 128, 128)] * 48),
    Model("Qwen3-0.6B", [LayerShape(8, 128, 128)] * 28),
    Model(
        "Gemma-3-1B",
        every(6, 26, LayerShape(1, 256, 256), LayerShape(1, 256, 256, sliding_window=512)),
    ),
    Model(
        "Gemma-3-27B",
        every(6, 62, LayerShape(16, 128, 128), LayerShape(16, 128, 128, sliding_window=1024)),
    ),
    Model(
        "Gemma-4-31B",
        every(6, 60, LayerShape(4, 512, 512), LayerShape(16, 256, 256, sliding_window=1024)),
    ),
    Model(
        "gpt-oss-20b",
        every(2, 24, LayerShape(8, 64, 64), LayerShape(8, 64, 64, sliding_window=128)),
    ),
    Model("Qwen3-Next-80B", [LayerShape(2, 256, 256)] * 12, [delta_net(32, 128, 128, 8192)] * 36),
    Model("Qwen3.5-4B", [LayerShape(4, 256, 256)] * 8, [delta_net(32, 128, 128, 8192)] * 24),
    Model("Jamba-like", [LayerShape(8, 128, 128)] * 4, [mamba(8192, 16)] * 28),
    Model("Falcon-H1-like", [LayerShape(2, 64, 64)] * 36, [mamba(1536, 128)] * 36),
    Model("DeepSeek-V3", [LATENT] * 61, compressible=False),
    Model(
        "DeepSeek-V3.2",
        [LATENT, LayerShape(1, 128, 0, fetched=True)] * 61,
        compressible=False,
    ),
    Model("Mamba-like", [], [mamba(5120, 16)] * 64),
    Model(
        "windows, states and full attention",
        [LayerShape(2, 64, 64), LayerShape(4, 64, 64, sliding_window=96)] * 3,
        [mamba(512, 16)] * 5,
    ),
]

SETTINGS = {
    "dense": None,
    "turboquant": TurboQuantConfig(parse_pair("q8_0/q3_0")),
    "turboquant, first and last dense": TurboQuantConfig(parse_pair("q4_0/q4_0"), boundary=2),
    "turboquant, some layers dense": TurboQuantConfig(parse_pair("q8_0/q4_0"), skip_layers=(0, 3)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_bytes_planned_are_bytes_held(model, setting, make_config):
    turboquant = SETTINGS[setting]
    constants = neutral_constants(model.layers)
    arguments = model.layers, 16, BFLOAT16, turboquant, constants, model.states
    nothing_to_compress = turboquant and 2 * turboquant.boundary >= len(model.layers)
    if nothing_to_compress or (turboquant and not model.compressible):
        with pytest.raises(UserError, match="cannot compress|skip_layers names layer 0"):
            make_backends(*arguments)
        return
    backends = make_backends(*arguments)
    config = make_config()
    specs = kv_cache_specs(backends, torch.bfloat16, model.states, 128)
    resolve_kv_cache_layout(config, [[KV_CACHE_LAYOUT]], list(specs.values()))
    needs = capacity(config, specs, 0)
    available = needs.bytes_for(128) + 2 * needs.bytes_per_block + 12345
    [planned] = get_kv_cache_configs(config, [specs], [available])

    cache = KVCache(backends, planned.num_blocks, model.states, cache_layout(planned))
    assert {tensor.size for tensor in planned.kv_cache_tensors} == {cache.nbytes}
    assert cache.nbytes <= available < cache.nbytes + needs.bytes_per_block
    assert cache.nbytes == planned.num_blocks * needs.bytes_per_block

    blocks = get_max_concurrency_for_kv_cache_config(config, planned)
    assert planned.num_blocks / blocks == pytest.approx(needs.blocks_for(128))
    assert len(block_table_sizes(config, planned)) == len(cache.groups)
    for group in cache.groups:
        if isinstance(group, StateGroup):
            assert group.block_size == 128
            continue
        assert {backends[layer].block_size for layer in group.layers} <= {group.block_size}
        windows = {backends[layer].shape.sliding_window for layer in group.layers}
        assert windows <= {group.sliding_window}
