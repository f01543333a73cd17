"""Recurrent states: read before a forward, written after it, never anybody else's."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache

from tests.tiny_models import RECURRENT, tiny_model
from vllm_metal.attention.metadata import StateMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.model.dry_forward import UnsupportedModelError
from vllm_metal.model.layer_cache import Forward
from vllm_metal.model.layer_state import LayerState, state_shapes
from vllm_metal.model.model_binding import ModelBinding

SHAPE = StateShape(((2, 3), None, (4,)), (mx.float32, None, mx.bfloat16))


class Layer:
    """One state over a cache of a few blocks."""

    def __init__(self):
        self.kv_cache = KVCache([], 6, [SHAPE])
        self.forward = Forward((), self.kv_cache)
        self.state = LayerState(0, SHAPE, self.forward)

    def begin(self, blocks: list[int], begins: bool = False) -> LayerState:
        metadata = (StateMetadata(mx.array(blocks), begins),)
        self.kv_cache.begin_forward(metadata)
        self.state.begin_forward()
        return self.state

    def run(self, blocks: list[int], value: float, begins: bool = False) -> None:
        state = self.begin(blocks, begins)
        state[0] = mx.full((len(blocks), 2, 3), value)
        state[2] = mx.full((len(blocks), 4), -value, mx.bfloat16)
        state.end_forward()
        self.kv_cache.evaluate()


def test_a_request_begins_without_a_state_whatever_its_block_held():
    layer = Layer()
    layer.run([2], 7.0, begins=True)
    state = layer.begin([2], begins=True)
    assert list(state.cache) == [None, None, None]
    assert isinstance(state, ArraysCache) and state.empty()


def test_states_go_with_their_requests_in_any_order():
    layer = Layer()
    for block, value in ((2, 2.0), (5, 5.0), (1, 1.0)):
        layer.run([block], value, begins=True)
    state = layer.begin([5, 1, 2])
    assert state[0].dtype == mx.float32 and state[2].dtype == mx.bfloat16
    assert state[0][:, 0, 0].tolist() == [5, 1, 2]
    assert state[2][:, 3].tolist() == [-5, -1, -2]
    assert state[1] is None
    layer.run([1, 5], 9.0)
    assert layer.begin([2, 5])[0][:, 1, 2].tolist() == [2, 9]


def test_a_forward_holds_nothing_afterwards():
    layer = Layer()
    layer.run([3], 1.0, begins=True)
    assert list(layer.state.cache) == [None] * 3


@pytest.mark.parametrize("model_type", RECURRENT)
def test_shapes_of_models(model_type):
    model = tiny_model(model_type)
    own = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3]]), cache=own))
    states = [c for cache in own for c in getattr(cache, "caches", [cache])]
    expected = [s.cache for s in states if isinstance(s, ArraysCache)]
    found = ModelBinding(model).states
    assert len(found) == len(expected)
    for shape, arrays in zip(found, expected, strict=True):
        assert shape.shapes == tuple(array.shape[1:] for array in arrays)
        assert shape.dtypes == tuple(array.dtype for array in arrays)


def test_a_state_that_grows_is_refused():
    def run(token_ids, caches, states):
        length = token_ids.shape[1] + (0 if states[0][0] is None else states[0][0].shape[1])
        states[0][0] = mx.zeros((1, length))
        return mx.zeros((*token_ids.shape, 8))

    with pytest.raises(
        UnsupportedModelError, match="state 0 is .* after a prompt and .* after the next token"
    ):
        state_shapes(run, [], [1], "odd")
