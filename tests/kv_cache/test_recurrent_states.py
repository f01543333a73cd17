"""Recurrent states: read before a forward pass, written after it, never another request's."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.attention.metadata import StateMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import AttentionGroup, StateGroup
from vllm_metal.kv_cache.recurrent_states import RecurrentStates
from vllm_metal.kv_cache.region_memory import RegionMemory

SHAPE = StateShape(((2, 3), None, (4,)), (mx.float32, None, mx.bfloat16))
SMALL = StateShape(((5,),), (mx.float16,))


class Cache:
    """Three states: the first two in one region and in groups of their own, the third alone."""

    def __init__(self):
        shared = RegionMemory(8, SHAPE.page_bytes, {mx.uint16})
        own = RegionMemory(8, SMALL.page_bytes, {mx.uint16})
        groups = [AttentionGroup(8, (0,)), StateGroup((0, 2)), StateGroup((1,))]
        regions = [((0, 1), shared), ((2,), own)]
        self.states = RecurrentStates([SHAPE, SMALL, SMALL], groups, regions)

    def begin(self, blocks: list[int], others: list[int], begins: bool = False) -> None:
        """Blocks of the requests in either group of states."""
        metadata = [
            None,
            *(StateMetadata(mx.array(b), mx.array(b), begins) for b in (blocks, others)),
        ]
        self.states.begin_forward(metadata)

    def run(self, blocks: list[int], others: list[int], value: float, begins: bool = False) -> None:
        self.begin(blocks, others, begins)
        rows = len(blocks)
        last = mx.full((rows, 4), -value, mx.bfloat16)
        self.states.keep(0, [mx.full((rows, 2, 3), value), None, last])
        self.states.keep(1, [mx.full((rows, 5), value + 0.5)])
        self.states.keep(2, [mx.full((rows, 5), value + 0.25)])
        mx.eval(self.states.kept)
        self.states.write()


def test_a_request_begins_without_a_state_whatever_its_block_held():
    cache = Cache()
    cache.run([2], [3], 7.0, begins=True)
    cache.begin([2], [3], begins=True)
    assert cache.states.old(0) == [None, None, None]
    assert cache.states.old(1) == [None]


def test_states_go_with_their_requests_in_any_order():
    cache = Cache()
    for block, value in ((2, 2.0), (5, 5.0), (1, 1.0)):
        cache.run([block], [block + 1 if block == 2 else block + 2], value, begins=True)
    cache.begin([5, 1, 2], [7, 3, 3])
    first, none, last = cache.states.old(0)
    assert none is None
    assert first.dtype == mx.float32 and last.dtype == mx.bfloat16
    assert first[:, 0, 0].tolist() == [5, 1, 2]
    assert last[:, 3].tolist() == [-5, -1, -2]
    assert cache.states.old(1)[0][:, 4].tolist() == [5.5, 1.5, 1.5]
    assert cache.states.old(2)[0][:, 0].tolist() == [5.25, 1.25, 2.25]
    cache.run([1, 5], [3, 7], 9.0)
    cache.begin([2, 5], [3, 7])
    assert cache.states.old(0)[0][:, 1, 2].tolist() == [2, 9]


def test_what_a_model_does_to_its_state_leaves_the_old_one():
    """Models replace the entries of the list that they are given."""
    cache = Cache()
    cache.run([2], [3], 7.0, begins=True)
    cache.begin([2], [3])
    cache.states.old(1)[0] = mx.zeros((1, 5))
    assert cache.states.old(1)[0].tolist() == [[7.5] * 5]


def test_a_copied_block_keeps_both_states():
    cache = Cache()
    cache.run([2], [3], 7.0, begins=True)
    cache.states.copy(2, 6)
    cache.run([2], [3], 8.0)
    cache.begin([6], [3])
    assert cache.states.old(0)[0][0, 0, 0].item() == 7
    np.testing.assert_array_equal(np.array(cache.states.old(2)[0]), np.full((1, 5), 7.25))


def test_a_state_that_a_model_forgets_to_set_is_an_error():
    cache = Cache()
    cache.begin([2], [3], begins=True)
    with pytest.raises(AssertionError, match="not set an array"):
        cache.states.keep(0, [None, None, mx.zeros((1, 4))])


def test_a_state_is_read_in_one_block_and_written_to_another():
    cache = Cache()
    cache.run([2], [3], 7.0, begins=True)
    old, new = mx.array([2]), mx.array([5])
    other = StateMetadata(mx.array([3]), mx.array([6]), False)
    metadata = [None, StateMetadata(old, new, False), other]
    cache.states.begin_forward(metadata)
    assert cache.states.old(0)[0][0, 0, 0].item() == 7
    cache.states.keep(0, [mx.full((1, 2, 3), 8.0), None, mx.full((1, 4), 8.0, mx.bfloat16)])
    for state in (1, 2):
        cache.states.keep(state, [mx.full((1, 5), 8.0)])
    mx.eval(cache.states.kept)
    cache.states.write()
    for block, value in ((2, 7), (5, 8)):
        cache.begin([block], [3])
        assert cache.states.old(0)[0][0, 0, 0].item() == value
