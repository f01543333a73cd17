"""Small forward passes at start that measure how much temporary memory a step takes.

They run the real model through the real backends, over two blocks: a block table may name one
block over and over, and what is gathered takes the same memory. What many rows and tokens take
follows by arithmetic (`kv_cache/workspace.py`).
"""

import gc
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.kv_cache.workspace import ForwardPeaks
from vllm_metal.model.model_binding import ModelBinding

NUM_BLOCKS = 2
"""Of a cache to measure with: the null block and the one that every table names."""

_PREFILL_ROWS, _PREFILL_ATTENDING = 128, 16
_DECODE_ROWS, _DECODE_ATTENDING = 16, 4
_TOKENS = 2048
"""The larger numbers of rows and tokens; the smaller ones are parts of them."""


def prefill_peaks(
    binding: ModelBinding, kv_cache: KVCache, query_len: int, max_tokens: int
) -> ForwardPeaks:
    """Of a chunk of one prompt.

    Args:
        binding: the model, bound to `kv_cache`.
        kv_cache: `NUM_BLOCKS` blocks.
        query_len: tokens of the largest chunk.
        max_tokens: of the longest request.

    Raises:
        UserError: MLX's backend lacks an operation of the model in this type.
    """

    def run(rows: int, tokens: int) -> None:
        tables = [_table(1, group.block_size, tokens)[0] for group in kv_cache.groups]
        metadata = prefill_metadata(kv_cache.groups, tables, tokens - rows, rows)
        _finish(binding, kv_cache, mx.zeros((1, rows), mx.int32), metadata)

    try:
        run(1, 1)
    except RuntimeError as error:
        raise UserError(
            f"MLX cannot run model type {binding.model_type!r} on this device",
            [f"{error} (another --dtype may do)"],
        ) from error
    gc.collect()  # arrays that are freed between two readings falsify a peak
    most = min(_PREFILL_ROWS, query_len, max(1, max_tokens - 1))
    attending = min(_PREFILL_ATTENDING, query_len, max(1, max_tokens // 2))
    return ForwardPeaks(
        {rows: _peak(run, rows, min(rows + 1, max_tokens)) for rows in _few_and_many(most)},
        _grid(run, _few_and_many(attending), max_tokens),
    )


def decode_peaks(
    binding: ModelBinding, kv_cache: KVCache, max_requests: int, max_tokens: int
) -> ForwardPeaks:
    """Of a decode forward pass, and of sampling after it.

    Args:
        binding: the model, bound to `kv_cache`.
        kv_cache: `NUM_BLOCKS` blocks.
        max_requests: rows of the largest step.
        max_tokens: of the longest request.
    """

    def run(rows: int, tokens: int) -> None:
        tables = [_table(rows, group.block_size, tokens) for group in kv_cache.groups]
        positions = np.full(rows, tokens - 1, np.int32)
        metadata = decode_metadata(kv_cache.groups, tables, positions)
        logits = _finish(binding, kv_cache, mx.zeros((rows, 1), mx.int32), metadata)
        mx.eval(logits.astype(mx.float32))  # for a sampler in torch
        mx.eval(mx.concatenate([logits, logits[:1]]))  # where prompts end in the same step

    try:
        for rows in (2, 3):  # one of them could fit arrays that it is not meant for
            run(min(rows, max_requests), 1)
    except (TypeError, ValueError):  # it takes no array of positions: one row at a time
        max_requests = 1
    run(1, 1)
    gc.collect()
    return ForwardPeaks(
        {rows: _peak(run, rows, 1) for rows in _few_and_many(min(_DECODE_ROWS, max_requests))},
        _grid(run, _few_and_many(min(_DECODE_ATTENDING, max_requests)), max_tokens),
    )


def _few_and_many(most: int) -> tuple[int, int]:
    return max(1, most // 4), most


def _grid(
    run: Callable[[int, int], None], rows: Sequence[int], max_tokens: int
) -> dict[tuple[int, int], int]:
    most = min(_TOKENS, max_tokens)
    return {(r, s): _peak(run, r, s) for r in rows for s in (max(1, most // 2), most)}


def _table(rows: int, block_size: int, tokens: int) -> np.ndarray:
    """[rows, N] int32: every block of every request is block 1."""
    return np.ones((rows, -(-tokens // block_size)), np.int32)


def _finish(
    binding: ModelBinding,
    kv_cache: KVCache,
    token_ids: mx.array,
    metadata: Sequence[GroupMetadata],
) -> mx.array:
    logits = binding.forward(token_ids, metadata)[:, -1]
    kv_cache.evaluate(logits)
    return logits


def _peak(run: Callable[[int, int], None], rows: int, tokens: int) -> int:
    """Bytes that exist at a time in `run`, beyond what exists before."""
    mx.synchronize()  # the last operation of an evaluation may still hold its inputs
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run(rows, tokens)
    peak = mx.get_peak_memory() - before
    mx.clear_cache()
    return peak
