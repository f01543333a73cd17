"""Recurrent states as a model sees them, and their shapes, found out at load."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache

from tests.tiny_models import RECURRENT, tiny_model
from vllm_metal.model.dry_forward import UnsupportedModelError
from vllm_metal.model.layer_state import state_cache, state_shapes
from vllm_metal.model.model_binding import ModelBinding


def test_a_state_is_what_models_ask_for():
    """They ask whether it is an `ArraysCache`, and replace its entries."""
    begins = state_cache([None, None])
    assert isinstance(begins, ArraysCache) and begins.empty()
    arrays = [mx.array([1.0]), None]
    state = state_cache(arrays)
    assert state[0] is arrays[0] and not state.empty()
    state[1] = mx.array([2.0])
    assert state.cache[1].item() == 2


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
