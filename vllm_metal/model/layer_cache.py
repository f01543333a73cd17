"""The cache of one attention layer as an mlx-lm model sees it, over pages.

A model stores keys and values with `update_and_fetch` and then does one of two things with what
comes back, which the dry forward has found out for each layer (`LayerShape.fetched`):

- it hands both to mlx-lm's `scaled_dot_product_attention`, any number of times. Then they are
  never computed: they stand for the pages, `paged_layer` knows them again, and the backend attends.
- it computes on them (MLA, logit soft-caps, ...). Then they are read from the pages.

Letters: B rows, H KV heads, L new tokens, S tokens of the longest request, D head size.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vllm_metal.attention.backend import Chunk, LayerShape, Rows
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import (
    AttentionMetadata,
    DecodeMetadata,
    GroupMetadata,
    StateMetadata,
)
from vllm_metal.kv_cache.cache import KVCache


@dataclass
class Forward:
    """What all layers share during one forward pass."""

    groups: tuple[GroupMetadata, ...] = ()
    """One for each KV group."""
    kv_cache: KVCache | None = None
    last_rows_only: bool = False


class LayerKVCache:
    """Speaks mlx-lm's cache protocol for one layer.

    Args:
        layer: index of the layer's pages.
        shape: what the dry forward found.
        forward: shared by all layers of the model.
        masks_rows: whether decode rows need a mask, as they do where any layer is fetched.
    """

    def __init__(self, layer: int, shape: LayerShape, forward: Forward, masks_rows: bool):
        self._layer = layer
        self._shape = shape
        self._forward = forward
        self._masks_rows = masks_rows
        self._new: tuple[mx.array, mx.array] | None = None
        self._returned: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> int | mx.array:
        """Position of the first token of this forward: an int, or [B] int32."""
        return self._metadata.offset

    @property
    def _metadata(self) -> AttentionMetadata:
        return self._forward.kv_cache.metadata_of(self._layer, self._forward.groups)

    def make_mask(
        self, query_len: int, return_array: bool = False, window_size: int | None = None
    ) -> str | mx.array | None:
        """The mask that mlx-lm's own cache would give, by position."""
        metadata = self._metadata
        window_size = window_size or self._shape.sliding_window
        windowed = window_size is not None and metadata.max_seq_len > window_size
        if isinstance(metadata, DecodeMetadata) and metadata.is_ragged:
            return causal_mask(metadata, window_size) if windowed or self._masks_rows else None
        if windowed:
            return causal_mask(metadata, window_size)
        if query_len == 1:
            return None
        return causal_mask(metadata) if return_array else "causal"

    def update_and_fetch(
        self,
        keys: mx.array,  # [B, H, L, Dk]
        values: mx.array,  # [B, H, L, Dv]
    ) -> tuple[mx.array, mx.array]:  # [B, H, S, Dk], [B, H, S, Dv]
        """Stores this forward's K/V in their slots; returns what stands for all of them."""
        metadata, kv_cache = self._metadata, self._forward.kv_cache
        one_array = values is keys and not self._shape.head_size_v
        if one_array:
            values = keys[..., :0]
        self._new = keys, values
        if isinstance(metadata, DecodeMetadata):
            new = keys[:, :, 0], values[:, :, 0]
        else:
            new = keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1)
        kv_cache.store(self._layer, *new, metadata)
        if not self._shape.fetched:
            return self._return(*(stand_in(part, metadata) for part in self._new))
        pages = kv_cache.pages(self._layer)
        keys, values = kv_cache.backends[self._layer].fetch(pages, *self._new, metadata)
        return self._return(keys, keys if one_array else values)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this forward's `update_and_fetch` returned, for layers that share this cache."""
        return self._returned

    @property
    def keys(self) -> mx.array:
        """As returned. Models assign to it only to order evaluation, which needs no help here."""
        return self._returned[0]

    @keys.setter
    def keys(self, _: Any) -> None:
        pass

    @property
    def values(self) -> mx.array:
        """As returned; see `keys`."""
        return self._returned[1]

    @values.setter
    def values(self, _: Any) -> None:
        pass

    def attend(
        self,
        queries: mx.array,  # [B, Hq, L, Dk]
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:  # [B, Hq, L, Dv]
        """Attends over the pages. The mask is causal, as the dry forward has checked."""
        metadata, kv_cache = self._metadata, self._forward.kv_cache
        backend, pages = kv_cache.backends[self._layer], kv_cache.pages(self._layer)
        if isinstance(metadata, DecodeMetadata):
            rows = Rows(queries[:, :, 0], metadata, scale, sinks)
            return backend.decode(pages, rows)[:, :, None]
        # Left to MLX, a chunk without context is stored last: keys and values of all layers exist.
        [queries] = mx.depends([queries], [array for array in pages if array is not None])
        keys, values = self._new
        chunk = Chunk(queries[0], keys[0], values[0], metadata, scale, sinks)
        return backend.prefill(pages, chunk)[None]

    def release(self) -> None:
        """Drops this forward's arrays."""
        self._new = self._returned = None

    def _return(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._returned = keys, values
        if not self._shape.fetched:
            _standing_for_pages[id(keys)] = self
        return self._returned


class UnusedCache(LayerKVCache):
    """Stands where a model has a cache that it never updates: positions and masks only."""

    def __init__(self, forward: Forward, masks_rows: bool):
        super().__init__(-1, LayerShape(0, 0, 0), forward, masks_rows)

    @property
    def _metadata(self) -> AttentionMetadata:
        groups = self._forward.groups
        return next(group for group in groups if not isinstance(group, StateMetadata))


_standing_for_pages: dict[int, LayerKVCache] = {}
"""Id of the keys that `update_and_fetch` returned in the running forward -> the cache that did.
Ids stay true because the cache holds the keys until `forget_layers`."""


def paged_layer(keys: mx.array, values: mx.array) -> LayerKVCache | None:
    """The layer whose pages these keys and values stand for; None where they are real."""
    layer = _standing_for_pages.get(id(keys))
    return layer if layer is not None and layer.values is values else None


def forget_layers(layers: list[LayerKVCache]) -> None:
    """Ends a forward pass."""
    _standing_for_pages.clear()
    for layer in layers:
        layer.release()


def stand_in(new: mx.array, metadata: AttentionMetadata) -> mx.array:
    """An array of the shape and type of all keys or values, [B, H, S, D], not to be computed.

    It is full of NaN: a model that computes on it after all gives logits that nobody mistakes.
    """
    batch, heads, _, size = new.shape
    return mx.full((batch, heads, metadata.max_seq_len, size), mx.nan, new.dtype)
