"""What a model's own caches say of its layers."""

import pytest
from mlx_lm.models import cache as mlx_lm_cache

from tests.tiny_models import tiny_model
from vllm_metal.model.layer_kinds import (
    AttentionKind,
    StateKind,
    arrange,
    cache_kinds,
    has_recurrent_state,
    kinds_in_order,
)


class Model:
    """Nothing but its caches."""

    def __init__(self, *caches):
        self._caches = caches

    def make_cache(self):
        return list(self._caches)


def test_every_kind():
    both = mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), mlx_lm_cache.KVCache())
    window = mlx_lm_cache.RotatingKVCache(max_size=24)
    arrangement, reasons = cache_kinds(Model(mlx_lm_cache.KVCache(), window, both))
    assert reasons == []
    assert arrangement == [AttentionKind(), AttentionKind(24), (StateKind(2), AttentionKind())]
    assert len(list(kinds_in_order(arrangement))) == 4


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (mlx_lm_cache.ChunkedKVCache(8), "chunked attention"),
        (
            mlx_lm_cache.RotatingKVCache(max_size=24, keep=4),
            "a sliding window that keeps its first 4 tokens",
        ),
        (mlx_lm_cache.QuantizedKVCache(), "a cache that the model quantises itself"),
        (object(), "a object, which is not known"),
    ],
)
def test_others_are_refused_by_name(cache, reason):
    _, reasons = cache_kinds(Model(mlx_lm_cache.KVCache(), cache))
    assert reasons == [f"layer 1 needs {reason}"]


def test_caches_of_ours_stand_where_the_models_stood():
    both = mlx_lm_cache.CacheList(mlx_lm_cache.ArraysCache(2), mlx_lm_cache.KVCache())
    one = mlx_lm_cache.CacheList(mlx_lm_cache.KVCache())
    arrangement, _ = cache_kinds(Model(both, mlx_lm_cache.KVCache(), one))
    first, second, third = arrange(arrangement, ["a", "b", "c"], ["s"])
    assert (first[0], first[1], second, third[0]) == ("s", "a", "b", "c")


@pytest.mark.parametrize(
    ("model_type", "recurrent"),
    [("llama", False), ("gemma3_text", False), ("jamba", True), ("falcon_h1", True)],
)
def test_models_with_recurrent_state(model_type, recurrent):
    assert has_recurrent_state(tiny_model(model_type)) == recurrent
