"""Probes at start: whether rows may have positions of their own."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.tiny_models import FETCHED, ONE_AT_A_TIME, SERVED, tiny_model
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense import DensePages
from vllm_metal.model.model_binding import BoundModel, ModelBinding
from vllm_metal.startup import decode_probe

BLOCK = 16


def bound(model: nn.Module, num_blocks: int = 8) -> BoundModel:
    binding = ModelBinding(model)
    backends = [DensePages(shape, BLOCK, mx.float32) for shape in binding.layers]
    return binding.bind(KVCache(backends, num_blocks))


@pytest.mark.parametrize(
    "model_type", [*SERVED, *(name for name in FETCHED if name != "gemma2"), "gemma4_shared"]
)
def test_models_that_take_an_array_of_positions(model_type):
    assert decode_probe.takes_batched_offsets(bound(tiny_model(model_type)))


@pytest.mark.parametrize("model_type", [*ONE_AT_A_TIME, "afm7", "gemma2"])
def test_models_that_refuse_an_array_of_positions(model_type):
    assert not decode_probe.takes_batched_offsets(bound(tiny_model(model_type)))


class FirstPosition(nn.Module):
    """A rotary embedding that rotates every row as if it stood where the first one does."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return self.rope(x, offset=offset if isinstance(offset, int) else offset[0])


def test_a_model_that_takes_them_and_is_wrong():
    """One layer of three mistakes the position, with small weights: still seen."""
    model = tiny_model("llama")
    attention = model.layers[1].self_attn
    attention.rope = FirstPosition(attention.rope)
    assert not decode_probe.takes_batched_offsets(bound(model))


def test_half_precision_is_not_mistaken_for_it():
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    assert decode_probe.takes_batched_offsets(bound(model))


def test_probes_write_no_more_than_their_blocks():
    """Pages of other blocks stay as they were."""
    model = bound(tiny_model("llama"))
    decode_probe.takes_batched_offsets(model)
    assert all(array[1].any() and array[2].any() for array in model.kv_cache.arrays)
    assert not any(array[0].any() or array[3:].any() for array in model.kv_cache.arrays)


def test_a_probed_cache_serves_as_a_new_one():
    model = bound(tiny_model("llama"))
    metadata = PrefillMetadata(mx.array([[1]]), mx.arange(9) + BLOCK, 0, 9)
    fresh = model.forward(mx.arange(9)[None], [metadata])
    mx.eval(fresh, model.kv_cache.arrays)
    decode_probe.takes_batched_offsets(model)
    again = model.forward(mx.arange(9)[None], [metadata])
    assert mx.array_equal(fresh, again)


def test_logits_that_are_no_numbers_are_refused():
    model = tiny_model("llama")
    model.layers[2].mlp.up_proj.weight[0, 0] = mx.nan
    with pytest.raises(UserError, match="'llama' produces NaN logits"):
        decode_probe.takes_batched_offsets(bound(model))
