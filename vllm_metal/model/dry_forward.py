"""Finds out what a model does with each of its caches, before the first request.

The model runs a few tokens on caches that hold nothing and note what happens. Nothing is
evaluated, so a long context costs nothing, and neither does a model without weights. A model may
do one thing with a short context and another with a long one (sparse attention), or one thing with
one token and another with several (MLA), so it runs all four; a backend attends for a layer only
if all four runs left attention to it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.errors import UserError
from vllm_metal.model.layer_cache import LayerCache

Run = Callable[[mx.array, Sequence[LayerCache]], mx.array]
"""Runs the model on token ids [B, L] with these caches in model order; gives lazy logits."""

LONG_CONTEXT = 1 << 20
"""Tokens: more than any sparse attention leaves whole."""

_EMPTY = mx.zeros((1, 0), mx.int32)


class UnsupportedModelError(UserError):
    """The model cannot be served; the message gives all reasons."""

    def __init__(self, model_type: str, reasons: list[str]):
        self._model_type = model_type
        super().__init__(f"Model type {model_type!r} cannot be served", reasons)

    def _arguments(self) -> tuple:
        return self._model_type, self.reasons


@dataclass(frozen=True)
class CacheUse:
    """What a model does with its caches."""

    shapes: list[LayerShape | None]
    """Shape of each cache; None where the model never uses the cache."""
    changes_with_length: bool
    """Whether a layer leaves attention to the backend in a short context only."""


def observe(run: Run, windows: Sequence[int | None], model_type: str) -> CacheUse:
    """Runs the model dry.

    Args:
        run: the model.
        windows: sliding window of each cache; None: it keeps all tokens.
        model_type: for the refusal.

    Raises:
        UnsupportedModelError: the model fails on such caches or uses them in an unknown way.
    """
    passes = list(dry_forwards(run, windows, model_type))
    shapes: list[LayerShape | None] = []
    reasons: list[str] = []
    changes = False
    for layer, uses in enumerate(zip(*passes, strict=True)):
        reasons += [f"layer {layer} {problem}" for problem in _problems(uses)]
        attended = [use.attended for use in uses]
        used = uses[0].sizes and not reasons
        shapes.append(uses[0].layer_shape(fetched=not all(attended)) if used else None)
        changes = changes or len(set(attended[:2])) > 1 or len(set(attended[2:])) > 1
    if reasons:
        raise UnsupportedModelError(model_type, summarise(reasons))
    return CacheUse(shapes, changes)


def _problems(uses: "Sequence[_DryCache]") -> list[str]:
    """Reasons why one cache's use in all passes cannot be served, to follow the words `layer N`."""
    found = [problem for use in uses for problem in use.problems]
    found += [
        f"updates its cache {len(use.sizes)} times in one forward, not once"
        for use in uses
        if len(use.sizes) > 1
    ]
    if not found and len({tuple(use.sizes) for use in uses}) > 1:
        found.append("uses its cache in some forwards only, or for keys and values of other sizes")
    return list(dict.fromkeys(found))


def dry_forwards(
    run: Run, windows: Sequence[int | None], model_type: str
) -> "Iterator[list[_DryCache]]":
    """Runs the model four times; yields the caches of each run."""
    for metadata, query_len in _dry_metadata():
        caches = [_DryCache(metadata, window) for window in windows]
        try:
            run(mx.zeros((1, query_len), mx.int32), caches)
        except Exception as error:
            raise UnsupportedModelError(
                model_type, [f"its forward pass failed on a paged cache ({error})"]
            ) from error
        yield caches


def dry_logits(run: Run, windows: Sequence[int | None]) -> mx.array:
    """Lazy logits [1, L, vocabulary] of a few tokens."""
    metadata, query_len = _dry_metadata()[0]
    caches = [_DryCache(metadata, window) for window in windows]
    return run(mx.zeros((1, query_len), mx.int32), caches)


def summarise(reasons: list[str], most: int = 4) -> list[str]:
    """The first few reasons, and how many more there are."""
    shown = reasons[:most]
    if len(reasons) > most:
        shown.append(f"and {len(reasons) - most} more like these")
    return shown


def _dry_metadata() -> list[tuple[AttentionMetadata, int]]:
    """Several tokens after a short and a long context, one token after either; and how many."""
    contexts = 4, LONG_CONTEXT
    return [
        *((PrefillMetadata(_EMPTY, _EMPTY[0], context, query_len=3), 3) for context in contexts),
        *(
            (DecodeMetadata(_EMPTY, mx.array([context + 1]), _EMPTY[0], context, context + 1), 1)
            for context in contexts
        ),
    ]


class _DryCache(LayerCache):
    """Stands in for `LayerKVCache` in a dry forward and notes how the model uses it."""

    def __init__(self, metadata: AttentionMetadata, sliding_window: int | None):
        super().__init__(metadata, sliding_window)
        self.sizes: list[tuple[int, int, int]] = []
        """KV heads and head sizes of keys and values, of each update."""
        self.one_array = False
        self.attends = 0
        self.own_mask = False
        self.problems: list[str] = []

    @property
    def attended(self) -> bool:
        """Whether nothing but causal attention was done with the keys and values."""
        return self.attends > 0 and not self.own_mask

    def layer_shape(self, fetched: bool) -> LayerShape:
        num_kv_heads, head_size, head_size_v = self.sizes[0]
        head_size_v = 0 if fetched and self.one_array else head_size_v
        return LayerShape(num_kv_heads, head_size, head_size_v, fetched, self._sliding_window)

    def make_mask(
        self, query_len: int, return_array: bool = False, window_size: int | None = None
    ) -> str | mx.array | None:
        if window_size is not None:
            return causal_mask(self._metadata, window_size)
        return super().make_mask(query_len, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.sizes.append((keys.shape[1], keys.shape[3], values.shape[3]))
        self.one_array = values is keys
        if keys.shape[:3] != values.shape[:3]:
            self.problems.append(
                f"caches keys {list(keys.shape)} and values {list(values.shape)} together"
            )
        return self._return_in_pages(keys, values)

    def attend(
        self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        self.attends += 1
        window = self._sliding_window
        expected = causal_mask(self._metadata, window)
        causal = mask == "causal" if isinstance(mask, str) else mask is expected
        if not causal and (mask is not None or queries.shape[2] > 1):
            if window is not None:
                self.problems.append(f"keeps {window} tokens and masks others than those")
            self.own_mask = True
        return mx.zeros((*queries.shape[:-1], self.values.shape[-1]), queries.dtype)
