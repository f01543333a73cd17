"""Probes at start: memory of a prefill, and whether rows may have positions of their own."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.tiny_models import FETCHED, ONE_AT_A_TIME, SERVED, tiny_model
from vllm_metal import warm_up
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.planner import extrapolate_workspace
from vllm_metal.metal_kernel_backend.dense import DensePages

BLOCK = 16


def bound(model: nn.Module, num_blocks: int = 8) -> tuple[ModelBinding, KVCache]:
    binding = ModelBinding(model)
    backends = [DensePages(shape, BLOCK, mx.float32) for shape in binding.layers]
    kv_cache = KVCache(backends, num_blocks)
    binding.bind(kv_cache)
    return binding, kv_cache


@pytest.mark.parametrize("model_type", [*SERVED, *(FETCHED.keys() - {"gemma2"}), "gemma4_text"])
def test_models_that_take_an_array_of_positions(model_type):
    assert warm_up.takes_batched_offsets(*bound(tiny_model(model_type)))


@pytest.mark.parametrize("model_type", [*ONE_AT_A_TIME, "afm7", "gemma2"])
def test_models_that_refuse_an_array_of_positions(model_type):
    assert not warm_up.takes_batched_offsets(*bound(tiny_model(model_type)))


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
    assert not warm_up.takes_batched_offsets(*bound(model))


def test_half_precision_is_not_mistaken_for_it():
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    assert warm_up.takes_batched_offsets(*bound(model))


def test_the_peak_of_a_prefill_grows_with_its_length():
    binding, kv_cache = bound(tiny_model("llama"))
    peaks = warm_up.measure_prefill_peaks(binding, kv_cache)
    short, long = warm_up.WORKSPACE_PROBE_LENGTHS
    assert set(peaks) == {short, long}
    assert 0 < peaks[short] < peaks[long]
    logits_and_hidden = long * 64 * 4
    assert peaks[long] >= logits_and_hidden


def test_the_peak_is_that_of_the_forward_alone():
    """Neither weights nor pages nor garbage of an earlier forward are counted."""
    binding, kv_cache = bound(tiny_model("llama"), num_blocks=2000)
    garbage = mx.zeros((1 << 20,))
    mx.eval(garbage)
    del garbage
    peaks = warm_up.measure_prefill_peaks(binding, kv_cache)
    assert max(peaks.values()) < 4 << 20 < kv_cache.nbytes


def test_probes_write_no_more_than_their_blocks():
    """Pages of other blocks stay as they were."""
    binding, kv_cache = bound(tiny_model("llama"))
    warm_up.takes_batched_offsets(binding, kv_cache)
    assert all(array[1].any() and array[2].any() for array in kv_cache.arrays)
    assert not any(array[0].any() or array[3:].any() for array in kv_cache.arrays)


def test_a_probed_cache_serves_as_a_new_one():
    binding, kv_cache = bound(tiny_model("llama"))
    metadata = PrefillMetadata(mx.array([[1]]), mx.arange(9) + BLOCK, 0, 9)
    fresh = binding.forward(mx.arange(9)[None], metadata)
    mx.eval(fresh, kv_cache.arrays)
    warm_up.takes_batched_offsets(binding, kv_cache)
    again = binding.forward(mx.arange(9)[None], metadata)
    assert mx.array_equal(fresh, again)


def test_logits_that_are_no_numbers_are_refused():
    model = tiny_model("llama")
    model.layers[2].mlp.up_proj.weight[0, 0] = mx.nan
    with pytest.raises(UserError, match="'llama' computes logits that are no numbers"):
        warm_up.takes_batched_offsets(*bound(model))


def test_what_mlx_cannot_run_is_refused_at_start():
    """MLX 0.32's CPU backend has no mixture of experts in 16 bits; whatever it lacks is told."""
    binding, kv_cache = bound(tiny_model("llama"))

    def fails(*_):
        raise RuntimeError("[GatherMM::eval] Currently only supports float32.")

    binding.forward = fails
    with pytest.raises(UserError, match="'llama' on this device") as error:
        warm_up.measure_prefill_peaks(binding, kv_cache)
    assert "only supports float32" in error.value.reasons[0]


@pytest.mark.parametrize("context_len", [0, 700])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "deepseek_v3", "deepseek_v32"])
def test_the_planned_workspace_holds_a_chunk_over_a_context(model_type, context_len):
    binding, kv_cache = bound(tiny_model(model_type), num_blocks=80)
    peaks = warm_up.measure_prefill_peaks(binding, kv_cache)
    query_len = 300
    end = context_len + query_len
    metadata = PrefillMetadata(
        block_table=mx.arange(1, -(-end // BLOCK) + 1)[None],
        slot_mapping=mx.arange(context_len, end) + BLOCK,
        context_len=context_len,
        query_len=query_len,
    )
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(binding.forward(mx.zeros((1, query_len), mx.int32), metadata), kv_cache.arrays)
    used = mx.get_peak_memory() - before
    planned = extrapolate_workspace(peaks, query_len) + max(
        backend.prefill_workspace_bytes(context_len, query_len, 4) for backend in kv_cache.backends
    )
    assert used < planned
