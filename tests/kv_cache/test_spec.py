"""What vLLM's own planner makes of our specs: bytes and blocks as they are really allocated."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import AttentionGroup, Region, StateGroup
from vllm_metal.kv_cache.spec import (
    KV_CACHE_LAYOUT,
    TurboQuantAttentionSpec,
    cache_layout,
    kv_cache_specs,
    layer_name,
)
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    VALUE_FORMATS,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

BLOCK = 16
SHAPE = LayerShape(num_kv_heads=3, head_size=64, head_size_v=64)
AVAILABLE = (1 << 20) + 12345


def dense(dtype: mx.Dtype, shape: LayerShape = SHAPE) -> DensePages:
    return DensePages(shape, BLOCK, dtype)


def turboquant(k_quant: str, v_quant: str, shape: LayerShape = SHAPE) -> TurboQuantReference:
    constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
    formats = parse_pair(f"{k_quant}/{v_quant}")
    return TurboQuantReference(shape, BLOCK, formats, constants)


MIXES: dict[str, list[AttentionBackend]] = {
    "float32": [dense(mx.float32)] * 4,
    "bfloat16": [dense(mx.bfloat16)] * 4,
    "one layer": [dense(mx.float16)],
    "two precisions": [dense(mx.float32), *[dense(mx.float16)] * 3, dense(mx.float32)],
    "narrow values": [dense(mx.float16, LayerShape(2, 64, 32))] * 3,
    "shapes that differ": [
        dense(mx.float16),
        dense(mx.float16, LayerShape(1, 128, 128)),
        dense(mx.float16, LayerShape(3, 64, 48)),
    ],
    "turboquant": [turboquant("q8_0", "q3_0")] * 4,
    "affine keys": [turboquant("uint4", "q4_0")] * 4,
    "dense at both ends": [
        dense(mx.float16),
        *[turboquant("q8_0", "q3_0")] * 4,
        dense(mx.float16),
    ],
    "two formats": [*[turboquant("q8_0", "q4_0")] * 2, *[turboquant("q4_0", "q3_0")] * 3],
    "formats and shapes that differ": [
        dense(mx.float32),
        turboquant("q5_0", "q3_0", LayerShape(1, 128, 128)),
        turboquant("int8", "q6_0", LayerShape(2, 96, 64)),
    ],
}


def plan(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> KVCacheConfig:
    """As vLLM's engine does it."""
    resolve_kv_cache_layout(config, [[KV_CACHE_LAYOUT]], list(specs.values()))
    [planned] = get_kv_cache_configs(config, [specs], [AVAILABLE])
    return planned


@pytest.mark.parametrize("mix", MIXES)
def test_a_spec_has_the_bytes_of_its_backend(mix):
    specs = kv_cache_specs(MIXES[mix], torch.float32)
    for spec, backend in zip(specs.values(), MIXES[mix], strict=True):
        assert isinstance(spec, FullAttentionSpec)
        assert spec.block_size == backend.block_size
        assert spec.page_size_bytes == backend.page_size_bytes


@pytest.mark.parametrize("mix", MIXES)
def test_vllm_plans_the_bytes_that_are_allocated(mix, make_config):
    """One group, so one block table; as many blocks as fit; each layer's region its own."""
    backends = MIXES[mix]
    specs = kv_cache_specs(backends, torch.float32)
    planned = plan(make_config(), specs)
    assert len(planned.kv_cache_groups) == 1
    assert set(planned.kv_cache_groups[0].layer_names) == set(specs)

    cache = KVCache(backends, planned.num_blocks)
    bytes_per_block = sum(backend.page_size_bytes for backend in backends)
    assert cache.nbytes == planned.num_blocks * bytes_per_block
    assert AVAILABLE - bytes_per_block < cache.nbytes <= AVAILABLE

    regions = []
    for tensor in planned.kv_cache_tensors:
        for i, name in enumerate(tensor.layers):
            page = specs[name].page_size_bytes
            assert tensor.block_stride == page
            start = tensor.offset + i * tensor.layer_stride
            regions.append((start, start + page * planned.num_blocks))
    regions.sort()
    assert len(regions) == len(backends)
    assert all(end <= start for (_, end), (start, _) in zip(regions, regions[1:], strict=False))
    assert regions[-1][1] <= AVAILABLE


@pytest.mark.parametrize(
    ("k_quant", "v_quant"),
    [(k_quant, "q3_0") for k_quant in KEY_FORMATS]
    + [("q8_0", v_quant) for v_quant in VALUE_FORMATS if v_quant != "q3_0"],
)
def test_every_format_is_planned_with_its_own_bytes(k_quant, v_quant, make_config):
    backends = [turboquant(k_quant, v_quant)] * 2
    specs = kv_cache_specs(backends, torch.float32)
    planned = plan(make_config(), specs)
    nbytes = KVCache(backends, planned.num_blocks).nbytes
    assert AVAILABLE - 2 * backends[0].page_size_bytes < nbytes <= AVAILABLE


def test_names_are_in_model_order():
    names = list(kv_cache_specs(MIXES["float32"], torch.float32))
    assert names == [layer_name(i) for i in range(4)]
    assert len(set(names)) == 4


def test_a_compressed_layer_says_its_formats():
    specs = kv_cache_specs([turboquant("q8_0", "q3_0")] * 2, torch.float32)
    [spec] = set(specs.values())
    assert isinstance(spec, TurboQuantAttentionSpec)
    assert (spec.k_quant, spec.v_quant) == ("q8_0", "q3_0")
    merged = TurboQuantAttentionSpec.merge([spec, spec])
    assert merged == spec


@pytest.mark.parametrize("other", [turboquant("q8_0", "q4_0"), dense(mx.float16)], ids=["4", "16"])
def test_layers_of_other_formats_are_not_merged(other):
    """vLLM merges by trying; a merge of unlike layers would count one's bytes for the other."""
    specs = kv_cache_specs([turboquant("q8_0", "q3_0"), other], torch.float32).values()
    for order in (list(specs), list(specs)[::-1]):
        with pytest.raises(AssertionError):
            type(order[0]).merge(order)


@pytest.mark.parametrize("compressed", [False, True])
def test_windows_are_groups_of_their_own(compressed, make_config):
    """Equal pages, so that the window's blocks are the same bytes as the full layers'."""
    shapes = [SHAPE, replace(SHAPE, sliding_window=32), replace(SHAPE, sliding_window=32)]
    make = (lambda s: turboquant("q8_0", "q3_0", s)) if compressed else partial(dense, mx.float16)
    backends = [make(shape) for shape in shapes]
    specs = kv_cache_specs(backends, torch.float32)
    assert isinstance(specs[layer_name(1)], SlidingWindowSpec)
    planned = plan(make_config(), specs)
    layout = cache_layout(planned)
    assert layout.groups == (
        AttentionGroup(BLOCK, layers=(0,)),
        AttentionGroup(BLOCK, layers=(1,), sliding_window=32),
        AttentionGroup(BLOCK, layers=(2,), sliding_window=32),
    )
    assert layout.regions == (Region(backends[0].page_size_bytes, layers=(0, 1, 2)),)


def test_states_share_the_pages_of_attention(make_config):
    state = StateShape(((5, 7), (3,)), (mx.float32, mx.bfloat16))
    backends = [DensePages(SHAPE, BLOCK, mx.float16)] * 2
    specs = kv_cache_specs(backends, torch.float32, [state] * 4, max_model_len=128)
    layout = cache_layout(plan(make_config(), specs))
    assert layout.groups == (
        AttentionGroup(BLOCK, layers=(0, 1)),
        StateGroup((0, 2), 128),
        StateGroup((1, 3), 128),
    )
    page = backends[0].page_size_bytes
    assert layout.regions == (Region(page, (0,), (0, 1)), Region(page, (1,), (2, 3)))


@pytest.mark.parametrize("offset", [8, 100])
def test_layers_that_overlap_by_part_are_refused(make_config, offset):
    planned = plan(make_config(), kv_cache_specs([dense(mx.float16)] * 2, torch.float32))
    planned.kv_cache_tensors[0].layer_stride = offset
    with pytest.raises(ValueError, match="overlap"):
        cache_layout(planned)
