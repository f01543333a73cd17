"""Small forward passes at start that measure how much temporary memory a step takes.

They run the real model through the real backends, over two blocks: a block table may name one
block over and over, and what is gathered takes the same memory. What many rows and tokens take
follows by arithmetic (`kv_cache/workspace.py`).
"""

import gc
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.errors import UserError
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.kv_cache.groups import KVGroup, StateGroup
from vllm_metal.kv_cache.workspace import ForwardPeaks
from vllm_metal.model.model_binding import BoundModel

NUM_BLOCKS = 2
"""Blocks of a cache to measure with: the null block and the one that every table names."""

_PREFILL_ROWS, _DECODE_ROWS = 128, 16
"""Rows of the larger forward pass with a context of one token; the smaller one has a quarter."""
_PREFILL_ATTENDING, _DECODE_ATTENDING = 16, 4
"""Rows of the larger forward pass that attends over many tokens."""
_TOKENS = 2048
"""Tokens of the longer context; the shorter one has half of them."""


def prefill_peaks(model: BoundModel, query_len: int, max_tokens: int) -> ForwardPeaks:
    """The peaks of chunks of one prompt.

    Args:
        model: the model over `NUM_BLOCKS` blocks.
        query_len: tokens of the largest chunk.
        max_tokens: tokens of the longest request.

    Raises:
        UserError: MLX's backend lacks an operation of the model in this type.
    """

    def run(rows: int, tokens: int) -> None:
        groups = model.kv_cache.groups
        tables = [_table(group, 1, tokens)[0] for group in groups]
        metadata = prefill_metadata(groups, tables, tokens - rows, rows)
        model.evaluate(mx.zeros((1, rows), mx.int32), metadata)

    try:
        run(1, 1)
    except RuntimeError as error:
        raise UserError(
            f"MLX cannot run model type {model.binding.model_type!r} on this device",
            [f"{error} (another --dtype may work)"],
        ) from error
    gc.collect()  # arrays that are freed between two readings falsify a peak
    most = min(_PREFILL_ROWS, query_len, max(1, max_tokens - 1))
    attending = min(_PREFILL_ATTENDING, query_len, max(1, max_tokens // 2))
    return ForwardPeaks(
        {rows: _peak(run, rows, min(rows + 1, max_tokens)) for rows in _few_and_many(most)},
        _grid(run, _few_and_many(attending), max_tokens),
    )


def decode_peaks(model: BoundModel, max_requests: int, max_tokens: int) -> ForwardPeaks:
    """The peaks of decode forward passes, and of sampling after them.

    Args:
        model: the model over `NUM_BLOCKS` blocks.
        max_requests: rows of the largest step.
        max_tokens: tokens of the longest request.
    """

    def run(rows: int, tokens: int) -> None:
        groups = model.kv_cache.groups
        tables = [_table(group, rows, tokens) for group in groups]
        positions = np.full(rows, tokens - 1, np.int32)
        metadata = decode_metadata(groups, tables, positions)
        logits = model.evaluate(mx.zeros((rows, 1), mx.int32), metadata)[:, -1]
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


def _table(group: KVGroup, rows: int, tokens: int) -> np.ndarray:
    """[rows, N] int32: every block of every request is block 1."""
    blocks = 1 if isinstance(group, StateGroup) else -(-tokens // group.block_size)
    return np.ones((rows, blocks), np.int32)


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
