"""Memory of small forward passes, and whether it tells that of large ones."""

import gc

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import ONE_AT_A_TIME, tiny_model
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.model_binding import BoundModel, ModelBinding
from vllm_metal.startup import workspace_probe
from vllm_metal.startup.workspace_probe import decode_peaks, prefill_peaks

QUERY_LEN, MAX_TOKENS, MAX_REQUESTS = 300, 1000, 24
HEADS = 4
TOLERANCE = 1.5
"""Models this small are dominated by what small forward passes do not tell."""
MODELS = ["llama", "gemma2", "deepseek_v3", "deepseek_v32", "gemma3_text", "gpt_oss", "jamba"]
TURBOQUANT = TurboQuantConfig(parse_pair("q8_0/q3_0"))
RUN_AHEAD = {"jamba"}
"""Models whose scan has operations for every token. MLX allocates for operations that wait for its
threads, so how much exists at a time depends on how busy they are, down to a quarter."""
BY_DAY = ["llama", "deepseek_v3", "gemma3_text", "jamba"]
CASES = [
    pytest.param(model, None, marks=[] if model in BY_DAY else pytest.mark.nightly)
    for model in MODELS
] + [
    pytest.param("compressible", TURBOQUANT),
    pytest.param("gemma3_text", TURBOQUANT),
]


def bound(
    model_type: str, num_blocks: int, turboquant: TurboQuantConfig | None = None
) -> BoundModel:
    if model_type == "compressible":
        model = tiny_model("llama", head_dim=64)
    else:
        model = tiny_model(model_type)
    binding = ModelBinding(model)
    constants = neutral_constants(binding.layers)
    backends = make_backends(binding.layers, 16, mx.float32, turboquant, constants, binding.states)
    return binding.bind(KVCache(backends, num_blocks, binding.states))


def peak(model: BoundModel, token_ids: mx.array, metadata) -> int:
    mx.eval(token_ids)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.evaluate(token_ids, metadata)
    return mx.get_peak_memory() - before


def tables(kv_cache: KVCache, rows: int) -> list[np.ndarray]:
    """Blocks of their own for every request."""
    each = -(-MAX_TOKENS // min(backend.block_size for backend in kv_cache.backends))
    table = 1 + np.arange(rows * each, dtype=np.int32).reshape(rows, each)
    return [table for _ in kv_cache.groups]


@pytest.mark.parametrize("context_len", [pytest.param(0, marks=pytest.mark.nightly), 700])
@pytest.mark.parametrize(("model_type", "turboquant"), CASES)
def test_a_large_chunk_takes_what_small_ones_tell(model_type, turboquant, context_len):
    small = bound(model_type, workspace_probe.NUM_BLOCKS, turboquant)
    peaks = prefill_peaks(small, QUERY_LEN, MAX_TOKENS)
    seq_len = context_len + QUERY_LEN
    planned = max(
        peaks.of_chunk(backend.chunk_memory(QUERY_LEN, seq_len, HEADS))
        for backend in small.kv_cache.backends
    )
    model = bound(model_type, 130, turboquant)
    kv_cache = model.kv_cache
    table = [table[0] for table in tables(kv_cache, 1)]
    if context_len:
        chunk = prefill_metadata(kv_cache.groups, table, 0, context_len)
        peak(model, mx.zeros((1, context_len), mx.int32), chunk)
    chunk = prefill_metadata(kv_cache.groups, table, context_len, QUERY_LEN)
    used = peak(model, mx.zeros((1, QUERY_LEN), mx.int32), chunk)
    assert used < TOLERANCE * planned
    if model_type not in RUN_AHEAD:
        assert planned < 3 * used


@pytest.mark.parametrize(
    ("model_type", "turboquant"), [c for c in CASES if c.values[0] != "gemma2"]
)
def test_a_large_decode_step_takes_what_small_ones_tell(model_type, turboquant):
    small = bound(model_type, workspace_probe.NUM_BLOCKS, turboquant)
    planned = decode_peaks(small, MAX_REQUESTS, MAX_TOKENS).of(MAX_REQUESTS, 600)
    model = bound(model_type, MAX_REQUESTS * 130, turboquant)
    kv_cache = model.kv_cache
    positions = np.full(MAX_REQUESTS, 599, np.int32)
    metadata = decode_metadata(kv_cache.groups, tables(kv_cache, MAX_REQUESTS), positions)
    used = peak(model, mx.zeros((MAX_REQUESTS, 1), mx.int32), metadata)
    assert used < TOLERANCE * planned
    assert planned < 3 * used


def test_keys_and_values_of_one_layer_exist_at_a_time():
    """A chunk takes no more in a deeper model."""
    found = []
    for layers in (3, 12):
        binding = ModelBinding(tiny_model("llama", num_hidden_layers=layers))
        backends = make_backends(binding.layers, 16, mx.float32, None, list)
        model = binding.bind(KVCache(backends, workspace_probe.NUM_BLOCKS))
        found.append(prefill_peaks(model, 128, 256).of(128, 128))
    assert found[1] < 1.2 * found[0]


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_servers_of_very_short_requests(max_tokens):
    small = bound("llama", workspace_probe.NUM_BLOCKS)
    assert prefill_peaks(small, max_tokens, max_tokens).of(1, 1) > 0
    assert decode_peaks(small, 1, max_tokens).of(1, 1) > 0


def test_models_that_take_no_array_of_positions_are_measured_row_by_row():
    small = bound(ONE_AT_A_TIME[0], workspace_probe.NUM_BLOCKS)
    assert {rows for rows, _ in decode_peaks(small, 8, 64).by_rows_and_tokens} == {1}


def test_only_the_forward_pass_is_counted():
    """Neither weights nor pages nor garbage of an earlier forward pass."""
    model = bound("llama", 2000)
    garbage = mx.zeros((1 << 20,))
    mx.eval(garbage)
    del garbage
    assert prefill_peaks(model, 128, 256).of(128, 128) < 4 << 20 < model.kv_cache.nbytes


def test_what_mlx_cannot_run_is_refused_at_start():
    """MLX 0.32's CPU backend has no mixture of experts in 16 bits; whatever it lacks is told."""
    model = bound("llama", workspace_probe.NUM_BLOCKS)

    def fails(*_):
        raise RuntimeError("[GatherMM::eval] Currently only supports float32.")

    model.forward = fails
    with pytest.raises(UserError, match="'llama' on this device") as error:
        prefill_peaks(model, 128, 256)
    assert "only supports float32" in error.value.reasons[0]
