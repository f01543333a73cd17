"""Binds an unmodified mlx-lm model to paged attention through mlx-lm's own cache protocol.

Every mlx-lm attention module does its projections, norms and RoPE, then calls

    keys, values = cache.update_and_fetch(keys, values)
    scaled_dot_product_attention(queries, keys, values, cache=cache, scale=, mask=, sinks=)

`LayerKVCache` is what the model sees as `cache`; the one rebound name is
`scaled_dot_product_attention`, which asks a `LayerKVCache` to attend and leaves every other
cache to mlx-lm. A dry forward at load, never evaluated, checks that the model keeps to the
protocol and yields the shape of each layer.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as mlx_lm_base

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.head_rows import slice_rows_before_head
from vllm_metal.attention.layer_kinds import AttentionKind, arrange, cache_kinds, kinds_in_order
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, GroupMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache

_mlx_lm_attention = mlx_lm_base.scaled_dot_product_attention


class UnsupportedModelError(UserError):
    """The model cannot be served; the message gives all reasons."""

    def __init__(self, model_type: str, reasons: list[str]):
        self._model_type = model_type
        super().__init__(f"Model type {model_type!r} cannot be served", reasons)

    def _arguments(self) -> tuple:
        return self._model_type, self.reasons


@dataclass
class _Forward:
    """What all layers share during one forward pass."""

    groups: tuple[GroupMetadata, ...] = ()
    """One for each KV group."""
    kv_cache: KVCache | None = None
    last_rows_only: bool = False


class LayerKVCache:
    """The cache of one attention layer, as an mlx-lm model sees it."""

    def __init__(self, layer: int, forward: _Forward):
        self._layer = layer
        self._forward = forward
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        """Position of the first token of this forward: an int, or [B] int32."""
        return self._metadata.offset

    @property
    def _metadata(self) -> AttentionMetadata:
        return self._forward.groups[self._forward.kv_cache.group_of_layer[self._layer]]

    def make_mask(self, query_len: int, **_: Any) -> str | None:
        """The backend masks by position; this only tells the model that attention is causal."""
        return None if query_len == 1 else "causal"

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:  # [B, H, L, D] each
        """Takes this forward's K/V and hands the same arrays on, to be recognised in `attend`."""
        self._keys, self._values = keys, values
        return keys, values

    def attend(
        self,
        queries: mx.array,  # [B, Hq, L, Dk]
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # [B, Hq, L, Dv]
        """Stores this forward's K/V in their slots and attends over the pages."""
        self._keys = self._values = None
        metadata, kv_cache = self._metadata, self._forward.kv_cache
        backend = kv_cache.backends[self._layer]
        if isinstance(metadata, DecodeMetadata):
            kv_cache.store(self._layer, keys[:, :, 0], values[:, :, 0], metadata)
            pages = kv_cache.pages(self._layer)
            out = backend.decode(pages, queries[:, :, 0], metadata, scale, sinks)
            return out[:, :, None]
        kv_cache.store(self._layer, keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1), metadata)
        pages = kv_cache.pages(self._layer)
        return backend.prefill(pages, queries[0], keys[0], values[0], metadata, scale, sinks)[None]


class _DryCache(LayerKVCache):
    """Stands in for `LayerKVCache` in the dry forward and notes how the model uses it."""

    offset = 0

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__(0, _Forward())
        self.sliding_window = sliding_window
        self.shape: LayerShape | None = None
        self.updates = 0
        self.attends = 0
        self.reasons: list[str] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.updates += 1
        self.shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], self.sliding_window)
        return super().update_and_fetch(keys, values)

    def attend(self, queries, keys, values, scale, mask, sinks):
        self.attends += 1
        if keys is not self._keys or values is not self._values:
            self.reasons.append("attends to other keys or values than its cache returned")
        if mask is not None and not isinstance(mask, str):
            self.reasons.append("brings an attention mask of its own")
        return mx.zeros((*queries.shape[:-1], values.shape[-1]), queries.dtype)

    def problems(self) -> list[str]:
        """Everything that breaks the protocol, in words that follow 'layer N ...'."""
        found = list(self.reasons)
        if self.updates != 1:
            found.append(f"updates its cache {self.updates} times in one forward, not once")
        if self.attends != 1:
            found.append(
                f"calls mlx-lm's scaled_dot_product_attention {self.attends} times with its "
                "cache, not once (its attention is computed in another way)"
            )
        return found


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name, for models whose cache may be a `LayerKVCache`."""
    if isinstance(cache, LayerKVCache):
        return cache.attend(queries, keys, values, scale, mask, sinks)
    return _mlx_lm_attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)


def _rebind_attention(model: nn.Module) -> None:
    """Rebinds the name in mlx-lm's base module and in every module that imported it."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]
    modules.append(sys.modules[type(model).__module__])
    for module in modules:
        if getattr(module, "scaled_dot_product_attention", None) is _mlx_lm_attention:
            module.scaled_dot_product_attention = scaled_dot_product_attention


class ModelBinding:
    """An mlx-lm model whose attention layers read and write a `KVCache`.

    Args:
        model: a model loaded by mlx-lm.

    Raises:
        UnsupportedModelError: the model's caches or its use of them cannot be served.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.model_type = getattr(model, "model_type", type(model).__module__)
        self._forward = _Forward()
        _rebind_attention(model)
        self._arrangement, reasons = cache_kinds(model)
        if reasons:
            raise UnsupportedModelError(self.model_type, _summarise(reasons))
        self.layers = self._dry_forward()
        self.states: list[StateShape] = []
        self._caches = arrange(
            self._arrangement,
            [LayerKVCache(layer, self._forward) for layer in range(len(self.layers))],
            [],
        )
        self.slices_before_head = slice_rows_before_head(
            model,
            lambda: self._dry_run([_DryCache(s.sliding_window) for s in self.layers]),
            lambda: self._forward.last_rows_only,
        )

    def bind(self, kv_cache: KVCache | None) -> None:
        """Sets the pages that following forwards use."""
        self._forward.kv_cache = kv_cache

    def forward(
        self,
        token_ids: mx.array,  # [B, L]
        metadata: Sequence[GroupMetadata],
        all_rows: bool = False,
    ) -> mx.array:  # [B, 1 or L, vocabulary]
        """One lazy forward pass; logits of the last token of each row, or of every token.

        `metadata` has one entry for each KV group of the pages.
        """
        self._forward.groups = tuple(metadata)
        self._forward.kv_cache.begin_forward()
        self._forward.last_rows_only = not all_rows
        logits = self.model(token_ids, cache=self._caches)
        self._forward.last_rows_only = False
        return logits if all_rows else logits[:, -1:]

    def _dry_forward(self) -> list[LayerShape]:
        kinds = kinds_in_order(self._arrangement)
        dry = [_DryCache(k.sliding_window) for k in kinds if isinstance(k, AttentionKind)]
        reasons = []
        try:
            self._dry_run(dry)
        except Exception as error:
            raise UnsupportedModelError(
                self.model_type,
                [
                    "its forward pass failed on a paged cache, so its attention is computed in "
                    f"another way than by mlx-lm's scaled_dot_product_attention ({error})"
                ],
            ) from error
        for layer, cache in enumerate(dry):
            reasons += [f"layer {layer} {problem}" for problem in cache.problems()]
        if reasons:
            raise UnsupportedModelError(self.model_type, _summarise(reasons))
        return [cache.shape for cache in dry]

    def _dry_run(self, caches: "list[_DryCache]") -> mx.array:
        """A lazy forward of three tokens; nothing is evaluated."""
        return self.model(mx.zeros((1, 3), mx.int32), cache=arrange(self._arrangement, caches, []))


def _summarise(reasons: list[str], most: int = 4) -> list[str]:
    shown = reasons[:most]
    if len(reasons) > most:
        shown.append(f"and {len(reasons) - most} more like these")
    return shown
