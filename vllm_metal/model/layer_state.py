"""The recurrent state of one layer as an mlx-lm model sees it, over blocks of the KV cache.

A model reads and replaces the entries of an `ArraysCache`, whose arrays have the requests of the
forward pass as their first axis. Here the entries are read from the requests' blocks before the
forward pass and written back after it (`KVCache`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from vllm_metal.attention.state_shape import StateShape
from vllm_metal.model.dry_forward import UnsupportedModelError, dry_forwards
from vllm_metal.model.layer_cache import Forward


class LayerState(ArraysCache):
    """Speaks mlx-lm's protocol for one layer; models ask whether it is an `ArraysCache`.

    Args:
        state: its index.
        shape: what the dry forward found.
        forward: shared by all layers of the model.
    """

    def __init__(self, state: int, shape: StateShape, forward: Forward):
        super().__init__(len(shape.shapes))
        self._state = state
        self._forward = forward

    def begin_forward(self) -> None:
        """Takes the states of the forward's requests; a request that begins has none."""
        self.cache = self._forward.kv_cache.states.old(self._state)

    def end_forward(self) -> None:
        """Hands the new states over."""
        arrays, self.cache = self.cache, [None] * len(self.cache)
        self._forward.kv_cache.states.keep(self._state, arrays)


def state_shapes(
    run: Callable[[mx.array, list[Any], list[Any]], mx.array],
    windows: Sequence[int | None],
    num_arrays: Sequence[int],
    model_type: str,
) -> list[StateShape]:
    """What each state holds after a dry prefill, and again after a dry decode step.

    Args:
        run: the model on token ids, attention caches and state caches.
        windows: as for `layer_shapes`.
        num_arrays: entries of each state.
        model_type: for the refusal.

    Raises:
        UnsupportedModelError: a state changes its shape or type from one step to the next.
    """
    if not num_arrays:
        return []
    caches = [ArraysCache(count) for count in num_arrays]

    def dry_run(token_ids: mx.array, layers: list[Any]) -> mx.array:
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
