"""Small forward passes before the first request: they measure, compile and check.

They run the real model through the real backend, so a model that would fail in its first request
fails at start.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache

WORKSPACE_PROBE_LENGTHS = (32, 96)
"""Prefill lengths at which peak memory is measured."""

_PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1])
_TOLERANCE = 0.1
"""Largest difference of logits, in standard deviations: far above rounding in any precision, far
below what a wrong position does."""


def measure_prefill_peaks(binding: ModelBinding, kv_cache: KVCache) -> dict[int, int]:
    """Peak temporary bytes of a prefill without context, by query length.

    Args:
        binding: the model, bound to `kv_cache`.
        kv_cache: a small cache with blocks for the longest probe after block 0.

    Raises:
        UserError: MLX's backend lacks an operation of the model in this type.
    """
    tables = [np.arange(1, kv_cache.num_blocks, dtype=np.int32)] * len(kv_cache.groups)
    peaks = {}
    for length in WORKSPACE_PROBE_LENGTHS:
        metadata = prefill_metadata(kv_cache.groups, tables, 0, length)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        try:
            _evaluate(binding, kv_cache, mx.zeros((1, length), mx.int32), metadata)
        except RuntimeError as error:
            raise UserError(
                f"MLX cannot run model type {binding.model_type!r} on this device",
                [f"{error} (another --dtype may do)"],
            ) from error
        peaks[length] = mx.get_peak_memory() - before
    mx.clear_cache()
    return peaks


def takes_batched_offsets(binding: ModelBinding, kv_cache: KVCache) -> bool:
    """Whether a `(2, 1)` decode with an array of offsets gives what two `(1, 1)` decodes give.

    Uses one block of each KV group for each request, which no request owns yet; False where there
    are too few.

    Raises:
        UserError: the model's logits are no numbers.
    """
    num_groups = len(kv_cache.groups)
    if kv_cache.num_blocks < 1 + num_groups * len(_PROMPTS):
        return False
    alone = []
    for i, prompt in enumerate(_PROMPTS):
        _prefill(binding, kv_cache, prompt[:-1], i)
        alone.append(_decode(binding, kv_cache, [i]))
    expected = mx.concatenate(alone)
    if mx.isnan(expected).any().item():
        raise UserError(
            f"Model type {binding.model_type!r} computes logits that are no numbers",
            ["its weights do not suit --dtype, are damaged, or it uses its cache in a way unseen"],
        )
    try:
        together = _decode(binding, kv_cache, range(len(_PROMPTS)))
    except (TypeError, ValueError):
        return False
    difference = mx.abs(together - expected).max() / mx.std(expected)
    return difference.item() < _TOLERANCE


def _tables(kv_cache: KVCache, requests: Sequence[int]) -> list[np.ndarray]:
    """The block tables [B, 1] of each group; no two share a block."""
    num_groups = len(kv_cache.groups)
    first = 1 + num_groups * np.array(requests, np.int32)[:, None]
    return [first + group for group in range(num_groups)]


def _prefill(binding: ModelBinding, kv_cache: KVCache, prompt: list[int], request: int) -> mx.array:
    tables = [table[0] for table in _tables(kv_cache, [request])]
    metadata = prefill_metadata(kv_cache.groups, tables, 0, len(prompt))
    return _evaluate(binding, kv_cache, mx.array([prompt]), metadata)


def _decode(binding: ModelBinding, kv_cache: KVCache, requests: Sequence[int]) -> mx.array:
    """Logits [B, vocabulary] of the last token of each request's prompt."""
    prompts = [_PROMPTS[request] for request in requests]
    positions = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    metadata = decode_metadata(kv_cache.groups, _tables(kv_cache, requests), positions)
    token_ids = mx.array([prompt[-1:] for prompt in prompts])
    return _evaluate(binding, kv_cache, token_ids, metadata)


def _evaluate(
    binding: ModelBinding,
    kv_cache: KVCache,
    token_ids: mx.array,
    metadata: Sequence[GroupMetadata],
) -> mx.array:
    logits = binding.forward(token_ids, metadata)[:, -1].astype(mx.float32)
    kv_cache.evaluate(logits)
    return logits
