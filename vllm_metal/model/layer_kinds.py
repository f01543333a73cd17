"""Which kind of cache each layer of a model asks for, from the model's own `make_cache()`.

    KVCache                 full attention
    RotatingKVCache         attention in a sliding window
    ArraysCache             recurrent state
    CacheList of these      several for one layer of the model

The model is then given caches of ours in the same arrangement. Attention caches are numbered in
the order in which they appear, and so are recurrent states.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache


@dataclass(frozen=True)
class AttentionKind:
    """A layer that keeps keys and values."""

    sliding_window: int | None = None
    """Tokens that it keeps; None: all."""


@dataclass(frozen=True)
class StateKind:
    """A layer that keeps a few arrays of fixed size."""

    num_arrays: int


Kind = AttentionKind | StateKind
Arrangement = list[Kind | tuple[Kind, ...]]
"""The model's list of caches, entry by entry; a tuple is a `CacheList`."""

_UNSUPPORTED = {
    "ChunkedKVCache": "chunked attention",
    "QuantizedKVCache": "a cache that the model quantises itself",
}


def cache_kinds(model: nn.Module) -> tuple[Arrangement, list[str]]:
    """The arrangement, and why layers of it cannot be served: lines 'layer N needs ...'."""
    arrangement: Arrangement = []
    reasons: list[str] = []
    for layer, cache in enumerate(mlx_lm_cache.make_prompt_cache(model)):
        several = type(cache) is mlx_lm_cache.CacheList
        found = [_kind(part) for part in (cache.caches if several else (cache,))]
        reasons += [f"layer {layer} needs {kind}" for kind in found if isinstance(kind, str)]
        kinds = tuple(kind for kind in found if not isinstance(kind, str))
        arrangement.append(kinds if several or not kinds else kinds[0])
    return arrangement, reasons


def kinds_in_order(arrangement: Arrangement) -> Iterator[Kind]:
    """Every kind, those within a `CacheList` one by one."""
    for entry in arrangement:
        yield from entry if isinstance(entry, tuple) else (entry,)


def has_recurrent_state(model: nn.Module) -> bool:
    """Whether any layer keeps recurrent state."""
    arrangement, _ = cache_kinds(model)
    return any(isinstance(kind, StateKind) for kind in kinds_in_order(arrangement))


def arrange(arrangement: Arrangement, attention: Iterable[Any], states: Iterable[Any]) -> list[Any]:
    """The model's list of caches, made of ours: those of attention layers, and of states."""
    sources = {AttentionKind: iter(attention), StateKind: iter(states)}
    return [
        mlx_lm_cache.CacheList(*(next(sources[type(kind)]) for kind in entry))
        if isinstance(entry, tuple)
        else next(sources[type(entry)])
        for entry in arrangement
    ]


def _kind(cache: Any) -> Kind | str:
    """The kind of one cache, or what it needs that there is not."""
    if type(cache) in (mlx_lm_cache.KVCache, mlx_lm_cache.ConcatenateKVCache):
        return AttentionKind()
    if type(cache) is mlx_lm_cache.RotatingKVCache:
        if cache.keep:
            return f"a sliding window that keeps its first {cache.keep} tokens"
        return AttentionKind(cache.max_size)
    if isinstance(cache, mlx_lm_cache.ArraysCache):
        return StateKind(len(cache.cache))
    name = type(cache).__name__
    return _UNSUPPORTED.get(name, f"a {name}, which is not known")
