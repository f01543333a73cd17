"""What a model does with each of its caches, found out before the first request.

The model runs a few tokens on caches that hold nothing and note what happens. Nothing is
evaluated, so a long context costs nothing, and neither does a model without weights. A model may
do one thing with a short context and another with a long one (sparse attention), or one thing with
one token and another with several (MLA), so it runs all four; a backend attends for a layer only
if all four runs left attention to it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.layer_cache import Forward, LayerKVCache, forget_layers, stand_in
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.errors import UserError

Run = Callable[[mx.array, list[LayerKVCache]], mx.array]
"""Runs the model on token ids [B, L] with one cache for each layer; gives lazy logits."""

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


def layer_shapes(run: Run, windows: Sequence[int | None], model_type: str) -> list[LayerShape]:
    """Shape of each layer's cache, and whether the model computes on what it holds.

    Args:
        run: the model.
        windows: sliding window of each layer; None: it keeps all tokens.
        model_type: for the refusal.

    Raises:
        UnsupportedModelError: the model fails on such caches or uses them in an unknown way.
    """
    passes = list(dry_forwards(run, windows, model_type))
    reasons: list[str] = []
    shapes = []
    for layer, caches in enumerate(zip(*passes, strict=True)):
        problems = [problem for cache in caches for problem in cache.problems]
        problems += [problem for cache in caches if (problem := cache.wrong_updates())]
        if not problems and len({cache.shape for cache in caches}) > 1:
            problems.append("caches keys or values of changing size")
        reasons += [f"layer {layer} {problem}" for problem in dict.fromkeys(problems)]
        if not problems:
            shapes.append(caches[0].layer_shape(fetched=not all(c.attended for c in caches)))
    if reasons:
        raise UnsupportedModelError(model_type, summarise(reasons))
    return shapes


def dry_forwards(
    run: Run, windows: Sequence[int | None], model_type: str
) -> "Iterator[list[_DryCache]]":
    """Runs the model four times; yields the caches of each run."""
    for metadata in _dry_metadata():
        layers = [_DryCache(metadata, window) for window in windows]
        try:
            run_dry(run, layers, metadata)
        except Exception as error:
            raise UnsupportedModelError(
                model_type, [f"its forward pass failed on a paged cache ({error})"]
            ) from error
        yield layers


def dry_logits(run: Run, windows: Sequence[int | None]) -> mx.array:
    """Lazy logits [1, L, vocabulary] of a few tokens."""
    metadata = next(iter(_dry_metadata()))
    return run_dry(run, [_DryCache(metadata, window) for window in windows], metadata)


def run_dry(run: Run, layers: "list[_DryCache]", metadata: AttentionMetadata) -> mx.array:
    """One lazy forward of one row."""
    query_len = metadata.max_seq_len - metadata.offset
    try:
        return run(mx.zeros((1, query_len), mx.int32), layers)
    finally:
        forget_layers(layers)


def summarise(reasons: list[str], most: int = 4) -> list[str]:
    """The first few reasons, and how many more there are."""
    shown = reasons[:most]
    if len(reasons) > most:
        shown.append(f"and {len(reasons) - most} more like these")
    return shown


def _dry_metadata() -> list[AttentionMetadata]:
    forwards: list[AttentionMetadata] = []
    for context_len in (4, LONG_CONTEXT):
        seq_len = context_len + 1
        forwards.append(PrefillMetadata(_EMPTY, _EMPTY[0], context_len, query_len=3))
        lens = mx.array([seq_len])
        forwards.append(DecodeMetadata(_EMPTY, lens, _EMPTY[0], context_len, seq_len))
    return forwards


class _DryCache(LayerKVCache):
    """Stands in for `LayerKVCache` in a dry forward and notes how the model uses it."""

    def __init__(self, metadata: AttentionMetadata, sliding_window: int | None):
        nothing = LayerShape(0, 0, 0, sliding_window=sliding_window)
        super().__init__(0, nothing, Forward((metadata,)), masks_rows=False)
        self.shape: tuple[int, int, int] | None = None
        self.one_array = False
        self.updates = 0
        self.attends = 0
        self.own_mask = False
        self.problems: list[str] = []

    @property
    def _metadata(self) -> AttentionMetadata:
        return self._forward.groups[0]

    @property
    def attended(self) -> bool:
        """Whether nothing but causal attention was done with the keys and values."""
        return self.attends > 0 and not self.own_mask and self.shape[2] > 0

    def layer_shape(self, fetched: bool) -> LayerShape:
        num_kv_heads, head_size, head_size_v = self.shape
        head_size_v = 0 if fetched and self.one_array else head_size_v
        window = self._shape.sliding_window
        return LayerShape(num_kv_heads, head_size, head_size_v, fetched, window)

    def wrong_updates(self) -> str | None:
        if self.updates == 1:
            return None
        return f"updates its cache {self.updates} times in one forward, not once"

    def make_mask(
        self, query_len: int, return_array: bool = False, window_size: int | None = None
    ) -> str | mx.array | None:
        if window_size is not None:
            return causal_mask(self._metadata, window_size)
        return super().make_mask(query_len, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.updates += 1
        self.shape = keys.shape[1], keys.shape[3], values.shape[3]
        self.one_array = values is keys
        if keys.shape[:3] != values.shape[:3]:
            self.problems.append(
                f"caches keys {list(keys.shape)} and values {list(values.shape)} together"
            )
        metadata = self._metadata
        return self._return(stand_in(keys, metadata), stand_in(values, metadata))

    def attend(
        self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        self.attends += 1
        metadata = self._metadata
        expected = [causal_mask(metadata)]
        if (window := self._shape.sliding_window) is not None:
            expected = [causal_mask(metadata, window)]
        causal = mask == "causal" if isinstance(mask, str) else any(mask is m for m in expected)
        if not causal and (mask is not None or queries.shape[2] > 1):
            if window is not None:
                self.problems.append(f"keeps {window} tokens and masks them in a way of its own")
            self.own_mask = True
        return mx.zeros((*queries.shape[:-1], self.values.shape[-1]), queries.dtype)
