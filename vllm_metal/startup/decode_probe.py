"""Small forward passes before the first request: they check and compile.

They run the real model through the real backend, so a model that would fail in its first request
fails at start.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import BoundModel

DecodeStep = Callable[[mx.array, Sequence[GroupMetadata]], mx.array]
"""`BoundModel.forward` of a decode step, or a trace of it."""

_PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1])
_TOLERANCE = 0.1
"""Largest difference of logits, in standard deviations: far above rounding in any precision, far
below what a wrong position does."""


def takes_batched_offsets(model: BoundModel) -> bool:
    """Whether a `(2, 1)` decode with an array of offsets gives what two `(1, 1)` decodes give.

    Uses one block of each KV group for each request, which no request owns yet; False where there
    are too few.

    Raises:
        UserError: the model's logits are NaN.
    """
    kv_cache, binding = model.kv_cache, model.binding
    enough = kv_cache.num_blocks > len(kv_cache.groups) * len(_PROMPTS)
    if not enough or not binding.decodes_batches:
        return False
    _prefill_prompts(model)
    requests = range(len(_PROMPTS))
    alone = [_decode(model.forward, kv_cache, [request]) for request in requests]
    expected = mx.concatenate(alone)
    if mx.isnan(expected).any().item():
        raise UserError(
            f"Model type {binding.model_type!r} produces NaN logits",
            [
                "its weights are damaged or overflow in this --dtype, or the model uses its KV "
                "cache in a way that was not noticed at load"
            ],
        )
    try:
        _prefill_prompts(model)
        together = _decode(model.forward, kv_cache, requests)
    except (TypeError, ValueError):
        return False
    return _agree(together, expected)


def traced_decode(model: BoundModel) -> DecodeGraphs | None:
    """Decode that replays traces, compiled for one row and for two.

    Follows `takes_batched_offsets`, and uses its blocks. None where the model's forward cannot be
    traced, gives something else when it is, or evaluates on its way.
    """
    if model.kv_cache.shares_arrays:
        return None
    graphs = DecodeGraphs(model)
    for rows in (1, 2):
        built = _decode(graphs, model.kv_cache, range(rows))
        try:
            replayed = _decode(graphs, model.kv_cache, range(rows))
        except (TypeError, ValueError, RuntimeError):
            return None
        if not _agree(replayed, built):
            return None
    return graphs


def _agree(logits: mx.array, expected: mx.array) -> bool:
    difference = mx.abs(logits - expected).max() / mx.std(expected)
    return bool((difference < _TOLERANCE).item())


def _tables(kv_cache: KVCache, requests: Sequence[int]) -> list[np.ndarray]:
    """The block tables [B, 1] of each group; no two share a block."""
    num_groups = len(kv_cache.groups)
    first = 1 + num_groups * np.array(requests, np.int32)[:, None]
    return [first + group for group in range(num_groups)]


def _prefill_prompts(model: BoundModel) -> None:
    """All but the last token of each prompt. A recurrent state moves on with every decode."""
    groups = model.kv_cache.groups
    for request, prompt in enumerate(_PROMPTS):
        tables = [table[0] for table in _tables(model.kv_cache, [request])]
        metadata = prefill_metadata(groups, tables, 0, len(prompt) - 1)
        model.evaluate(mx.array([prompt[:-1]]), metadata)


def _decode(step: DecodeStep, kv_cache: KVCache, requests: Sequence[int]) -> mx.array:
    """Logits [B, vocabulary], float32, of the last token of each request's prompt."""
    prompts = [_PROMPTS[request] for request in requests]
    positions = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    metadata = decode_metadata(kv_cache.groups, _tables(kv_cache, requests), positions)
    logits = step(mx.array([prompt[-1:] for prompt in prompts]), metadata)
    logits = logits[:, -1].astype(mx.float32)
    kv_cache.evaluate(logits)
    return logits
