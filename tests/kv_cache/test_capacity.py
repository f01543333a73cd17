"""Blocks, tokens and requests from bytes."""

from dataclasses import replace

import mlx.core as mx
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.capacity import (
    CacheSummary,
    Capacity,
    elements_per_token,
    has_one_group,
)
from vllm_metal.kv_cache.groups import AttentionGroup, StateGroup
from vllm_metal.metal_kernel_backend.dense.reference import DensePages

SHAPE = LayerShape(num_kv_heads=2, head_size=64, head_size_v=32)


def test_the_null_block_takes_bytes_and_holds_no_token():
    capacity = Capacity(page_bytes=1050, bytes_per_block=100, block_size=16)
    assert capacity.num_blocks == 10
    assert capacity.tokens == 9 * 16
    assert capacity.requests(33) == 9 / 3


@pytest.mark.parametrize("page_bytes", [-5, 0, 99])
def test_no_room_is_no_token(page_bytes):
    capacity = Capacity(page_bytes, 100, 16)
    assert (capacity.num_blocks, capacity.tokens, capacity.requests(1)) == (0, 0, 0)


def test_layers_of_one_group_have_a_page_each_in_a_block():
    backends = [DensePages(SHAPE, 16, mx.float16), DensePages(SHAPE, 16, mx.float32)]
    page = 16 * 2 * (64 + 32)
    assert Capacity.of_one_group(backends, 1 << 20) == Capacity(1 << 20, page * 2 + page * 4, 16)


def test_layers_are_of_one_group_where_all_attend_over_a_whole_request():
    window = replace(SHAPE, sliding_window=32)
    state = StateShape(((1, 8),), (mx.float32,))
    assert has_one_group([SHAPE, SHAPE], [])
    assert not has_one_group([SHAPE, window], [])
    assert not has_one_group([window, window], [])
    assert not has_one_group([SHAPE], [state])
    assert not has_one_group([], [])


def test_dense_16_bit_pages_have_ratio_one():
    summary = CacheSummary.of([DensePages(SHAPE, 16, mx.float16)] * 3)
    assert elements_per_token(SHAPE) == 192
    assert (summary.bits_per_element, summary.num_compressed) == (16, 0)
    assert summary.bytes_per_token == summary.dense_bytes_per_token
    assert summary.bytes_per_token == 3 * 192 * 2


def test_float32_pages_count_as_they_are():
    assert CacheSummary.of([DensePages(SHAPE, 16, mx.float32)]).bits_per_element == 32


def test_the_ratio_compares_requests_over_all_groups():
    """A state takes its block with dense and with compressed layers alike."""
    groups = AttentionGroup(16, layers=(0,)), StateGroup((0,), 4096)
    compressed = AttentionGroup(64, layers=(0,)), groups[1]
    dense = Capacity(0, 100, 16, groups)
    assert Capacity(0, 100, 64, compressed).ratio(dense, 128) == (8 + 1) / (2 + 1)
    assert Capacity(0, 25, 16).ratio(Capacity(0, 100, 16), 128) == 4


def test_tokens_of_all_requests_in_the_layer_that_holds_most():
    groups = (
        AttentionGroup(16, layers=(0,)),
        AttentionGroup(40, layers=(1,)),
        StateGroup((0,), 4096),
    )
    assert Capacity(1050, 100, 16, groups).pooled_tokens == 10 * 40
    assert Capacity(1050, 100, 16).pooled_tokens == 160


def test_groups_draw_from_one_pool():
    groups = (
        AttentionGroup(16, layers=(0,)),
        AttentionGroup(16, layers=(1,), sliding_window=33),
        StateGroup((0,), 4096),
    )
    capacity = Capacity(1050, 100, 16, groups, step_tokens=8)
    assert capacity.blocks_for(16) == 1 + 2 + 1
    assert capacity.blocks_for(1000) == 63 + 4 + 1  # 32 tokens and 8 in flight, and an edge
    assert capacity.requests(16) == 9 / 4
    assert capacity.tokens == 64
    assert capacity.blocks_for(64) <= 9 < capacity.blocks_for(65)
    assert capacity.bytes_for(16) == 400


def test_requests_of_states_alone_are_of_any_length():
    capacity = Capacity(1000, 100, 512, (StateGroup((0, 1), 512),), max_model_len=512)
    assert capacity.requests(512) == 9
    assert capacity.tokens == 9 * 512


def test_kept_states_take_blocks_of_the_pool():
    """Two groups of states: a request holds two blocks of each, and copies need two more."""
    states = [StateGroup((i,), 64, blocks_held=2, spare_blocks=2) for i in range(2)]
    capacity = Capacity(2050, 100, 64, (AttentionGroup(64, layers=(0,)), *states))
    assert capacity.blocks_for(128) == 2 + 4
    assert capacity.blocks_needed(128) == 1 + 4 + 6
    assert capacity.requests(128) == (20 - 1 - 4) / 6
    assert capacity.tokens == (20 - 1 - 4 - 4) * 64
    assert capacity.kept_state_bytes == 200
    assert capacity.kept_states(128) == (20 - 1 - 6) // 2
    alone = capacity.without_kept_states()
    assert alone.blocks_for(128) == 2 + 2 and alone.blocks_needed(128) == 5
