"""What mlx-lm's own caches give, and how a model uses them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention


@dataclass
class CacheUse:
    """How a model used its caches of keys and values."""

    forwards: int = 0
    layers: set[int] = field(default_factory=set)
    """Decoder layers that updated one."""
    updates: int = 0
    attends: int = 0
    """Calls of MLX's attention."""
    sinks: bool = False
    sizes: set[tuple[int, int, int]] = field(default_factory=set)
    """(KV heads, key size, value size) of the layers."""


class ObservedCache:
    """One of mlx-lm's caches of keys and values.

    With a backend, what it returns went through the backend's codec, but for the tokens of a
    prefill chunk itself where the backend is not `reproducible`.
    """

    def __init__(self, cache: Any, layer: int, use: CacheUse, backend: TurboQuantAttention | None):
        self._cache, self._layer, self._use, self._backend = cache, layer, use, backend
        self._returned: tuple[mx.array, mx.array] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._use.layers.add(self._layer)
        self._use.updates += 1
        self._use.sizes.add((keys.shape[1], keys.shape[3], values.shape[3]))
        new, one_array = keys.shape[2], values is keys
        keys, values = self._cache.update_and_fetch(keys, values)
        if self._backend is not None:
            exact = new if new > 1 and not self._backend.reproducible else 0
            keys = _through(self._backend.key_codec, keys, exact)
            if one_array:
                values = keys
            elif values.shape[3]:
                values = _through(self._backend.value_codec, values, exact)
        self._returned = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self._returned is not None, "nothing was fetched yet"
        return self._returned


def reference_logits(
    model: nn.Module,
    chunks: Sequence[Sequence[int]],
    backends: Sequence[AttentionBackend] = (),
) -> tuple[np.ndarray, CacheUse]:
    """Logits [T, vocabulary] of every token on mlx-lm's own caches, and their use.

    Args:
        model: the model.
        chunks: token ids of each forward.
        backends: one for each cache of keys and values; the compressed ones lend their codec.
    """
    use = CacheUse()
    remaining = iter(backends)

    def observed(layer: int, cache: Any) -> Any:
        if isinstance(cache, mlx_lm_cache.CacheList):
            return mlx_lm_cache.CacheList(*(observed(layer, part) for part in cache.caches))
        if not hasattr(cache, "update_and_fetch"):
            return cache
        backend = next(remaining, None)
        compressed = backend if isinstance(backend, TurboQuantAttention) else None
        return ObservedCache(cache, layer, use, compressed)

    own_caches = mlx_lm_cache.make_prompt_cache(model)
    caches = [observed(layer, cache) for layer, cache in enumerate(own_caches)]
    rows = []
    with _attention_observed(use):
        for chunk in chunks:
            use.forwards += 1
            rows.append(model(mx.array([list(chunk)]), cache=caches)[0].astype(mx.float32))
            mx.eval(rows)
    return np.array(mx.concatenate(rows)), use


def kinds(model: nn.Module, config: dict[str, Any], use: CacheUse) -> list[str]:
    """What distinguishes a model, in the field's terms; nothing for a plain decoder.

    Args:
        model: the model.
        config: its `config.json`.
        use: of its caches.
    """
    caches = {
        type(leaf).__name__
        for cache in mlx_lm_cache.make_prompt_cache(model)
        for leaf in getattr(cache, "caches", [cache])
    }
    modules = {type(module).__name__ for module in model.modules()}
    found = {
        "recurrent state only": caches == {"ArraysCache"},
        "hybrid": "ArraysCache" in caches and len(caches) > 1,
        "MLA": bool(config.get("text_config", config).get("kv_lora_rank")),
        "sliding window": "RotatingKVCache" in caches,
        "chunked attention": "ChunkedKVCache" in caches,
        "sinks": use.sinks,
        "shared KV": 0 < use.updates < use.attends,
        "own attention": use.attends < len(use.layers) * use.forwards,
        "own cache": not caches <= _CACHES,
        "mixed head sizes": len(use.sizes) > 1,
        "MoE": bool(modules & {"SwitchGLU", "SwitchMLP"}),
        "text part": "text_config" in config,
    }
    return [kind for kind, holds in found.items() if holds]


_CACHES = {"KVCache", "RotatingKVCache", "ChunkedKVCache", "ArraysCache"}


@contextmanager
def _attention_observed(use: CacheUse) -> Iterator[None]:
    attention = mx.fast.scaled_dot_product_attention

    def observed(*args: Any, **kwargs: Any) -> mx.array:
        use.attends += 1
        use.sinks |= kwargs.get("sinks") is not None
        return attention(*args, **kwargs)

    mx.fast.scaled_dot_product_attention = observed
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention


def _through(codec: Any, vectors: mx.array, exact: int) -> mx.array:
    """[B, H, S, D] quantised and back, but for the last `exact` tokens."""
    stored = vectors.shape[2] - exact
    if not stored:
        return vectors
    context = vectors[:, :, :stored].swapaxes(1, 2)
    context = codec.dequantize(codec.quantize(context)).swapaxes(1, 2)
    return mx.concatenate([context.astype(vectors.dtype), vectors[:, :, stored:]], axis=2)
