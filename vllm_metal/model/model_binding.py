"""Binds an unmodified mlx-lm model to paged attention through mlx-lm's own cache protocol.

Every mlx-lm attention module does its projections, norms and RoPE, then calls

    keys, values = cache.update_and_fetch(keys, values)
    scaled_dot_product_attention(queries, keys, values, cache=cache, scale=, mask=, sinks=)

`LayerKVCache` is what the model sees as `cache`; the one rebound name is
`scaled_dot_product_attention`, which lets the backend attend where keys and values stand for
pages, and leaves all others to mlx-lm. `dry_forward` finds out at load what the model does with
each cache.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models.cache import ArraysCache

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.model.dry_forward import (
    UnsupportedModelError,
    dry_logits,
    observe,
    summarise,
)
from vllm_metal.model.head_rows import slice_rows_before_head
from vllm_metal.model.layer_cache import (
    Forward,
    LayerKVCache,
    UnusedCache,
    forget_layers,
    paged_layer,
)
from vllm_metal.model.layer_kinds import (
    AttentionKind,
    StateKind,
    arrange,
    cache_kinds,
    kinds_in_order,
)
from vllm_metal.model.layer_state import LayerState, state_shapes

_mlx_lm_attention = mlx_lm_base.scaled_dot_product_attention


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name, for keys and values that may stand for pages."""
    layer = paged_layer(keys, values)
    if layer is not None:
        return layer.attend(queries, scale, mask, sinks)
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

    A layer is one cache in use: models with several in one decoder layer (an indexer, double
    attention) have more layers here, those that share keys and values or skip attention fewer.

    Args:
        model: a model loaded by mlx-lm.

    Raises:
        UnsupportedModelError: the model's caches or its use of them cannot be served.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.model_type = getattr(model, "model_type", type(model).__module__)
        self._forward = Forward()
        _rebind_attention(model)
        arrangement, reasons = cache_kinds(model)
        if reasons:
            raise UnsupportedModelError(self.model_type, summarise(reasons))
        kinds = list(kinds_in_order(arrangement))
        windows = [kind.sliding_window for kind in kinds if isinstance(kind, AttentionKind)]
        num_arrays = [kind.num_arrays for kind in kinds if isinstance(kind, StateKind)]

        def run(token_ids: mx.array, caches: list[Any], states: list[Any]) -> mx.array:
            return model(token_ids, cache=arrange(arrangement, caches, states))

        def dry_run(token_ids: mx.array, caches: list[Any]) -> mx.array:
            return run(token_ids, caches, [ArraysCache(count) for count in num_arrays])

        use = observe(dry_run, windows, self.model_type)
        self.layers = [shape for shape in use.shapes if shape is not None]
        self.states = state_shapes(run, windows, num_arrays, self.model_type)
        self.decodes_batches = not use.changes_with_length
        """Whether a probe with short requests can tell that rows may be decoded together."""
        self._caches = self._make_caches(use.shapes)
        self._state_caches = [
            LayerState(state, shape, self._forward) for state, shape in enumerate(self.states)
        ]
        self._run = run
        self.slices_before_head = slice_rows_before_head(
            model, lambda: dry_logits(dry_run, windows), lambda: self._forward.last_rows_only
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
        self._forward.kv_cache.begin_forward(self._forward.groups)
        self._forward.last_rows_only = not all_rows
        try:
            for state in self._state_caches:
                state.begin_forward()
            logits = self._run(token_ids, self._caches, self._state_caches)
            for state in self._state_caches:
                state.end_forward()
        finally:
            self._forward.last_rows_only = False
            forget_layers(self._caches)
        return logits if all_rows else logits[:, -1:]

    def _make_caches(self, shapes: list[LayerShape | None]) -> list[LayerKVCache]:
        fetches = any(shape.fetched for shape in self.layers)
        layers = itertools.count()
        return [
            LayerKVCache(next(layers), shape, self._forward, masks_rows=fetches)
            if shape
            else UnusedCache(self._forward, masks_rows=fetches)
            for shape in shapes
        ]
