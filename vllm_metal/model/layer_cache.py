"""The cache of one attention layer as an mlx-lm model sees it, over pages.

A model stores keys and values with `update_and_fetch` and then does one of two things with what
comes back, which the dry forward has found out for each layer (`LayerShape.fetched`):

- it hands both to mlx-lm's `scaled_dot_product_attention`, any number of times. Then they are
  never computed: they are `InPages`, which name their layer, and the layer's backend attends.
- it computes on them (MLA, logit soft-caps, ...). Then they are read from the pages.

These objects are made for one forward pass and are dropped with it.

Letters: B rows, H KV heads, L new tokens, S tokens of the longest request, D head size.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vllm_metal.attention.backend import Chunk, LayerShape, Rows
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, GroupMetadata
from vllm_metal.kv_cache.cache import KVCache


class Observer:
    """Sees what passes through the layers; this base class ignores it."""

    def stored(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Called when a layer stores keys [T, H, Dk] and values [T, H, Dv]."""

    def attended(self, layer: int, chunk: Chunk, outputs: mx.array) -> None:
        """Called when a backend has attended from a prefill chunk; outputs are [Hq, L, Dv]."""


@dataclass(frozen=True)
class ForwardPass:
    """The facts of one forward pass that all its layers share."""

    kv_cache: KVCache
    groups: tuple[GroupMetadata, ...]
    """One for each KV group."""
    masks_rows: bool
    """Whether decode rows need a mask, as they do where any layer is fetched."""
    observer: Observer


class InPages(mx.array):
    """All keys, or all values, of a layer: an array of their shape and type, never computed.

    It is full of NaN, so that a model that computes on it after all gives logits that are visibly
    wrong. Whatever MLX computes from it is a plain array.

    Args:
        new: the keys or values of the running forward pass, [B, H, L, D].
        seq_len: S.
        layer: the cache whose pages hold them. It is not kept alive: an array of the graph that
            held it would hold the pages.
    """

    def __init__(self, new: mx.array, seq_len: int, layer: LayerCache):
        batch, heads, _, size = new.shape
        super().__init__(mx.full((batch, heads, seq_len, size), mx.nan, new.dtype))
        self.layer = weakref.ref(layer)


def paged_layer(keys: mx.array, values: mx.array) -> LayerCache | None:
    """The layer whose pages hold these keys and values; None where they are plain arrays."""
    layer = keys.layer() if isinstance(keys, InPages) else None
    return layer if layer is not None and layer.values is values else None


class CachePositions:
    """The part of mlx-lm's cache protocol that needs no pages: positions and masks.

    It is all that a model needs of a cache that it never updates.

    Args:
        metadata: what the forward pass tells the layer; None where no layer attends.
        sliding_window: tokens that a query sees; None for all.
        masks_rows: whether decode rows need a mask.
    """

    def __init__(
        self,
        metadata: AttentionMetadata | None,
        sliding_window: int | None = None,
        masks_rows: bool = False,
    ):
        self._told = metadata
        self._sliding_window = sliding_window
        self._masks_rows = masks_rows

    @property
    def _metadata(self) -> AttentionMetadata:
        if self._told is None:
            raise RuntimeError("the model asks for positions, but no layer of it stores any keys")
        return self._told

    @property
    def offset(self) -> int | mx.array:
        """Position of the first token of this forward: an int, or [B] int32."""
        return self._metadata.offset

    def make_mask(
        self, query_len: int, return_array: bool = False, window_size: int | None = None
    ) -> str | mx.array | None:
        """The mask that mlx-lm's own cache would give, by position."""
        metadata = self._metadata
        window_size = window_size or self._sliding_window
        windowed = window_size is not None and metadata.max_seq_len > window_size
        if isinstance(metadata, DecodeMetadata) and metadata.is_ragged:
            return causal_mask(metadata, window_size) if windowed or self._masks_rows else None
        if windowed:
            return causal_mask(metadata, window_size)
        if query_len == 1:
            return None
        return causal_mask(metadata) if return_array else "causal"


class LayerCache(CachePositions, ABC):
    """mlx-lm's cache protocol, for a layer whose keys and values are used in one of the two ways.

    The model calls `update_and_fetch` first.
    """

    _returned: tuple[mx.array, mx.array] | None = None
    """The pair of arrays that `update_and_fetch` returned."""

    @abstractmethod
    def update_and_fetch(
        self,
        keys: mx.array,  # [B, H, L, Dk]
        values: mx.array,  # [B, H, L, Dv]
    ) -> tuple[mx.array, mx.array]:  # [B, H, S, Dk], [B, H, S, Dv]
        """Takes this forward's keys and values; returns all of them."""

    @abstractmethod
    def attend(
        self,
        queries: mx.array,  # [B, Hq, L, Dk]
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # [B, Hq, L, Dv]
        """Attends over keys and values that are `InPages` of this layer."""

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The arrays that `update_and_fetch` returned, for layers that share this cache."""
        if self._returned is None:
            raise RuntimeError("the model reads a layer's keys and values before it stores any")
        return self._returned

    @property
    def keys(self) -> mx.array:
        """The keys that `update_and_fetch` returned.

        Some models assign `cache.keys = mx.depends(cache.keys, ...)`, so that evaluating mlx-lm's
        growing cache evaluates other arrays too. Pages are evaluated in every step, so nothing is
        left to order, and an assignment changes nothing.
        """
        return self.keys_and_values()[0]

    @keys.setter
    def keys(self, _: Any) -> None:
        """See the getter."""

    @property
    def values(self) -> mx.array:
        """The values that `update_and_fetch` returned; assigning changes nothing, see `keys`."""
        return self.keys_and_values()[1]

    @values.setter
    def values(self, _: Any) -> None:
        """See `keys`."""

    def _return(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._returned = keys, values
        return self._returned

    def _return_in_pages(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Returns `InPages` for all keys and values, given the new ones."""
        seq_len = self._metadata.max_seq_len
        return self._return(InPages(keys, seq_len, self), InPages(values, seq_len, self))


class LayerKVCache(LayerCache):
    """One layer over its pages.

    Args:
        layer: index of the layer's pages.
        shape: what the dry forward found.
        forward: shared by all layers of the model.
    """

    def __init__(self, layer: int, shape: LayerShape, forward: ForwardPass):
        metadata = forward.kv_cache.metadata_of(layer, forward.groups)
        super().__init__(metadata, shape.sliding_window, forward.masks_rows)
        self._layer = layer
        self._shape = shape
        self._forward = forward

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores this forward's keys and values in their slots; returns arrays for all of them."""
        metadata, kv_cache = self._metadata, self._forward.kv_cache
        one_array = values is keys and not self._shape.head_size_v
        if one_array:
            values = keys[..., :0]
        self._new = keys, values
        if isinstance(metadata, DecodeMetadata):
            new = keys[:, :, 0], values[:, :, 0]
        else:
            new = keys.squeeze(0).swapaxes(0, 1), values.squeeze(0).swapaxes(0, 1)
        self._forward.observer.stored(self._layer, *new)
        kv_cache.store(self._layer, *new, metadata)
        if not self._shape.fetched:
            return self._return_in_pages(keys, values)
        pages = kv_cache.pages(self._layer)
        keys, values = kv_cache.backends[self._layer].fetch(pages, keys, values, metadata)
        return self._return(keys, keys if one_array else values)

    def attend(
        self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Attends over the pages. The mask is causal, as the dry forward has checked."""
        metadata, kv_cache = self._metadata, self._forward.kv_cache
        backend, pages = kv_cache.backends[self._layer], kv_cache.pages(self._layer)
        if isinstance(metadata, DecodeMetadata):
            rows = Rows(queries[:, :, 0], metadata, scale, sinks)
            return backend.decode(pages, rows)[:, :, None]
        # Left to MLX, a chunk without context is stored last: keys and values of all layers exist.
        [queries] = mx.depends([queries], [array for array in pages if array is not None])
        # `squeeze` gives a view. MLX takes an index for a gather, which copies.
        keys, values = self._new
        own = queries.squeeze(0), keys.squeeze(0), values.squeeze(0)
        chunk = Chunk(*own, metadata, scale, sinks)
        outputs = backend.prefill(pages, chunk)
        self._forward.observer.attended(self._layer, chunk, outputs)
        return outputs[None]
