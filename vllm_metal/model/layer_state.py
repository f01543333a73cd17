"""The recurrent state of one layer as an mlx-lm model sees it.

A model reads and replaces the entries of an `ArraysCache`, whose arrays have the requests of the
forward pass as their first axis. The entries are read from the requests' blocks before the forward
pass and written back after it (`kv_cache/recurrent_states.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from vllm_metal.attention.state_shape import StateShape
from vllm_metal.model.dry_forward import UnsupportedModelError, dry_forwards


def state_cache(arrays: list[mx.array | None]) -> ArraysCache:
    """mlx-lm's own cache object, with these arrays in it, for one forward pass.

    The model replaces its entries; afterwards `cache` of the object has the new ones.
    """
    cache = ArraysCache(len(arrays))
    for i, array in enumerate(arrays):
        cache[i] = array
    return cache


def state_shapes(
    run: Callable[[mx.array, Sequence[Any], Sequence[Any]], mx.array],
    windows: Sequence[int | None],
    num_arrays: Sequence[int],
    model_type: str,
) -> list[StateShape]:
    """The shapes of all states, after a dry prefill and again after a dry decode step.

    Args:
        run: the model on token ids, attention caches and state caches.
        windows: sliding window of each attention cache; None: it keeps all tokens.
        num_arrays: entries of each state.
        model_type: for the refusal.

    Raises:
        UnsupportedModelError: a state changes its shape or type from one step to the next.
    """
    if not num_arrays:
        return []
    caches = [ArraysCache(count) for count in num_arrays]

    def dry_run(token_ids: mx.array, layers: Sequence[Any]) -> mx.array:
        return run(token_ids, layers, caches)

    steps = dry_forwards(dry_run, windows, model_type)
    prefilled, *_, decoded = [[_shape(cache.cache) for cache in caches] for _ in steps]
    reasons = [
        f"state {i} is {before} after a prompt and {after} after the next token"
        for i, (before, after) in enumerate(zip(prefilled, decoded, strict=True))
        if before != after
    ]
    if reasons:
        raise UnsupportedModelError(model_type, reasons[:4])
    return decoded


def _shape(arrays: Sequence[mx.array | None]) -> StateShape:
    return StateShape(
        tuple(None if array is None else tuple(array.shape[1:]) for array in arrays),
        tuple(None if array is None else array.dtype for array in arrays),
    )
