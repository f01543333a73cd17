"""Binds an unmodified mlx-lm model to paged attention through mlx-lm's own cache protocol.

Every mlx-lm attention module does its projections, norms and RoPE, then calls

    keys, values = cache.update_and_fetch(keys, values)
    scaled_dot_product_attention(queries, keys, values, cache=cache, scale=, mask=, sinks=)

`LayerKVCache` is what the model sees as `cache`; the one rebound name is
`scaled_dot_product_attention`, which lets the backend attend where keys and values are `InPages`,
and leaves all others to mlx-lm. `dry_forward` finds out at load what the model does with each
cache.
"""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models.cache import ArraysCache

from vllm_metal.attention.metadata import GroupMetadata, StateMetadata
from vllm_metal.errors import ChangedLibraryError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.model.dry_forward import (
    UnsupportedModelError,
    dry_logits,
    observe,
    summarise,
)
from vllm_metal.model.head_rows import HeadRows
from vllm_metal.model.layer_cache import (
    CachePositions,
    ForwardPass,
    LayerKVCache,
    Observer,
    paged_layer,
)
from vllm_metal.model.layer_kinds import (
    AttentionKind,
    StateKind,
    arrange,
    cache_kinds,
    kinds_in_order,
)
from vllm_metal.model.layer_state import state_cache, state_shapes

_ATTENTION = "scaled_dot_product_attention"
_mlx_lm_attention: Callable[..., mx.array] | None = getattr(mlx_lm_base, _ATTENTION, None)


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's function of that name, for keys and values that may be in pages."""
    layer = paged_layer(keys, values)
    if layer is not None:
        return layer.attend(queries, scale, mask, sinks)
    assert _mlx_lm_attention is not None  # `_rebind_attention` has made sure
    return _mlx_lm_attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)


def _rebind_attention(model: nn.Module) -> None:
    """Rebinds the name in mlx-lm's base module and in every module that imported it.

    A module that has no such name computes attention itself, which the dry forward finds out.

    Raises:
        ChangedLibraryError: mlx-lm's function is gone or takes other arguments.
    """
    # patch: mlx-lm's attention
    expected = list(inspect.signature(scaled_dot_product_attention).parameters)
    found = _mlx_lm_attention and list(inspect.signature(_mlx_lm_attention).parameters)
    if found != expected:
        change = f"its parameters are {found}, not {expected}" if found else "it does not exist"
        raise ChangedLibraryError("mlx-lm", f"{mlx_lm_base.__name__}.{_ATTENTION}", change)
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]
    modules.append(sys.modules[type(model).__module__])
    for module in modules:
        if getattr(module, _ATTENTION, None) is _mlx_lm_attention:
            setattr(module, _ATTENTION, scaled_dot_product_attention)


class ModelBinding:
    """An mlx-lm model, what it does with its caches, and how to run it over pages.

    A layer is one cache in use: models with several in one decoder layer (an indexer, double
    attention) have more layers here, those that share keys and values or skip attention fewer.

    Args:
        model: a model loaded by mlx-lm.

    Raises:
        UnsupportedModelError: the model's caches or its use of them cannot be served.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.model_type: str = getattr(model, "model_type", type(model).__module__)
        _rebind_attention(model)
        self._arrangement, reasons = cache_kinds(model)
        if reasons:
            raise UnsupportedModelError(self.model_type, summarise(reasons))
        kinds = list(kinds_in_order(self._arrangement))
        windows = [kind.sliding_window for kind in kinds if isinstance(kind, AttentionKind)]
        num_arrays = [kind.num_arrays for kind in kinds if isinstance(kind, StateKind)]

        def dry_run(token_ids: mx.array, caches: Sequence[Any]) -> mx.array:
            return self._run(token_ids, caches, [ArraysCache(count) for count in num_arrays])

        use = observe(dry_run, windows, self.model_type)
        self._shapes = use.shapes
        """Shape of each attention cache; None where the model never uses the cache."""
        self.layers = [shape for shape in use.shapes if shape is not None]
        self.states = state_shapes(self._run, windows, num_arrays, self.model_type)
        self.decodes_batches = not use.changes_with_length
        """Whether a probe with short requests can tell that rows may be decoded together."""
        self._head_rows = HeadRows(model, lambda: dry_logits(dry_run, windows))
        self.slices_before_head = self._head_rows.spares_head

    def bind(self, kv_cache: KVCache, observer: Observer | None = None) -> "BoundModel":
        """The model over these pages, with an observer of its layers if given."""
        return BoundModel(self, kv_cache, observer or Observer())

    def run_over_pages(
        self, token_ids: mx.array, forward: ForwardPass, all_rows: bool
    ) -> mx.array:  # [B, 1 or L, vocabulary]
        """One lazy forward pass; see `BoundModel.forward`."""
        with self._head_rows.last_only(not all_rows), self._states(forward) as states:
            logits = self._run(token_ids, self._caches(forward), states)
        return logits if all_rows else logits[:, -1:]

    def run_to_head(self, token_ids: mx.array, forward: ForwardPass) -> "RowLogits":
        """One lazy forward pass; see `BoundModel.forward_to_head`."""
        head = self._head_rows
        with self._states(forward) as states:
            caches = self._caches(forward)

            def run() -> mx.array:
                return self._run(token_ids, caches, states)

            if not head.spares_head:
                return RowLogits(run(), lambda logits: logits)
            return RowLogits(head.input_of_head(run), lambda hidden: head.head(hidden, run))

    @contextmanager
    def _states(self, forward: ForwardPass) -> Iterator[list[ArraysCache]]:
        """The recurrent states for a forward pass within the block, kept at its end."""
        recurrent = forward.kv_cache.states
        states = [state_cache(recurrent.old(state)) for state in range(len(self.states))]
        yield states
        for state, cache in enumerate(states):
            recurrent.keep(state, list(cache.cache))

    def _caches(self, forward: ForwardPass) -> list[CachePositions]:
        """An object for each attention cache of the model."""
        layers = itertools.count()
        unused = CachePositions(
            next((told for told in forward.groups if not isinstance(told, StateMetadata)), None),
            masks_rows=forward.masks_rows,
        )
        return [
            LayerKVCache(next(layers), shape, forward) if shape else unused
            for shape in self._shapes
        ]

    def _run(self, token_ids: mx.array, caches: Sequence[Any], states: Sequence[Any]) -> mx.array:
        return self.model(token_ids, cache=arrange(self._arrangement, caches, states))


@dataclass(frozen=True)
class RowLogits:
    """Logits of all rows of one chunk, to be computed in pieces."""

    hidden: mx.array
    """[1, L, hidden], what the head is given: to be evaluated first, with the pages. [1, L,
    vocabulary] of a model whose head cannot be told apart."""
    head: Callable[[mx.array], mx.array]

    def of(self, begin: int, end: int) -> mx.array:  # [end - begin, vocabulary]
        """Logits of the rows from `begin` to `end`, lazily."""
        return self.head(self.hidden[:, begin:end]).squeeze(0)


class BoundModel:
    """A model over its pages; `ModelBinding.bind` makes it."""

    def __init__(self, binding: ModelBinding, kv_cache: KVCache, observer: Observer):
        self.binding = binding
        self.kv_cache = kv_cache
        self._observer = observer
        self._masks_rows = any(shape.fetched for shape in binding.layers)

    def forward(
        self,
        token_ids: mx.array,  # [B, L]
        metadata: Sequence[GroupMetadata],
        all_rows: bool = False,
    ) -> mx.array:  # [B, 1 or L, vocabulary]
        """One lazy forward pass; logits of the last token of each row, or of every token.

        `metadata` has one entry for each KV group of the pages.
        """
        return self.binding.run_over_pages(token_ids, self._begin(metadata), all_rows)

    def _begin(self, metadata: Sequence[GroupMetadata]) -> ForwardPass:
        groups = tuple(metadata)
        self.kv_cache.begin_forward(groups)
        return ForwardPass(self.kv_cache, groups, self._masks_rows, self._observer)

    def forward_to_head(
        self,
        token_ids: mx.array,  # [1, L]
        metadata: Sequence[GroupMetadata],
    ) -> RowLogits:
        """One lazy forward pass of a chunk whose rows all get logits, a few at a time."""
        return self.binding.run_to_head(token_ids, self._begin(metadata))

    def evaluate(
        self, token_ids: mx.array, metadata: Sequence[GroupMetadata], all_rows: bool = False
    ) -> mx.array:
        """`forward`, evaluated, with all pages written."""
        logits = self.forward(token_ids, metadata, all_rows)
        self.kv_cache.evaluate(logits)
        return logits
