"""Layouts for whoever has no scheduler, and how groups describe themselves."""

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import AttentionGroup, CacheLayout, Region, StateGroup
from vllm_metal.metal_kernel_backend.dense.reference import DensePages

FULL = DensePages(LayerShape(1, 8, 8), 16, mx.float16)
WINDOW = DensePages(LayerShape(1, 8, 8, sliding_window=5), 16, mx.float16)
STATE = StateShape(((3,),), (mx.float32,))


def test_a_separate_layout_has_a_group_for_each_kind_and_shares_nothing():
    layout = CacheLayout.separate([WINDOW, FULL, WINDOW], [STATE, STATE])
    assert layout.groups == (
        AttentionGroup(16, layers=(0, 2), sliding_window=5),
        AttentionGroup(16, layers=(1,)),
        StateGroup((0, 1)),
    )
    pages = 16 * 16 * 2
    assert layout.regions[0] == Region(pages, layers=(0,))
    assert layout.regions[4] == Region(12, states=(1,))
    assert len(layout.regions) == 5


def test_groups_describe_themselves():
    assert AttentionGroup(16, layers=(0, 1)).describe() == "2 layers (16 tokens)"
    assert AttentionGroup(8, (0,), sliding_window=4).describe() == "1 layers (8 tokens, window 4)"
    assert StateGroup((0, 1), 8).describe() == "2 states"
