"""Makes the metadata of every KV group from the block tables.

A request in a group of sliding-window layers begins at the first block that its window touches,
so that the work of a step does not grow with the request.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.metadata import (
    DecodeMetadata,
    GroupMetadata,
    PrefillMetadata,
    StateMetadata,
)
from vllm_metal.attention.slots import compose_slots
from vllm_metal.kv_cache.groups import AttentionGroup, KVGroup, StateGroup, rounded_blocks

_NO_LIMIT = np.iinfo(np.int32).max
"""Tokens in a block that holds the state of a request of any length."""


def decode_metadata(
    groups: Sequence[KVGroup],
    block_tables: Sequence[np.ndarray],  # int32 [B, N] for each group
    positions: np.ndarray,  # int32 [T], of the new tokens
    query_lens: Sequence[int] = (),
) -> tuple[GroupMetadata, ...]:
    """The metadata of a `(T, 1)` forward: the new tokens of each request, one after the other.

    `query_lens` has their number for each request; () where each has one.
    """
    offset = _offset(positions)
    return tuple(
        state_rows(group, table, positions)
        if isinstance(group, StateGroup)
        else decode_rows(group, table, positions, offset, query_lens)
        for group, table in zip(groups, block_tables, strict=True)
    )


def prefill_metadata(
    groups: Sequence[KVGroup],
    block_tables: Sequence[np.ndarray],  # int32 [N] for each group
    start: int,
    query_len: int,
) -> tuple[GroupMetadata, ...]:
    """The metadata of a `(1, L)` forward: tokens start .. start + query_len - 1 of a request."""
    return tuple(
        state_chunk(group, table, start, query_len)
        if isinstance(group, StateGroup)
        else prefill_chunk(group, table, start, query_len)
        for group, table in zip(groups, block_tables, strict=True)
    )


def gathered_tokens(groups: Sequence[KVGroup], seq_len: int) -> int:
    """Tokens that one layer gathers of a request in a decode step, with the padding of its graph.

    The layer that gathers most counts; 0 where all layers are recurrent.
    """
    most = 0
    for group in groups:
        if isinstance(group, StateGroup):
            continue
        held = seq_len
        if group.sliding_window is not None:
            held = min(held, group.sliding_window + group.block_size - 1)
        most = max(most, rounded_blocks(-(-held // group.block_size)) * group.block_size)
    return most


def decode_rows(
    group: AttentionGroup,
    table: np.ndarray,  # int32 [B, N]
    positions: np.ndarray,  # int32 [T], of the new tokens
    offset: mx.array | int | None = None,
    query_lens: Sequence[int] = (),
) -> DecodeMetadata:
    """`decode_metadata` for one group. Groups may share the array `offset` of the positions."""
    offset = _offset(positions) if offset is None else offset
    size = group.block_size
    lens = np.array(query_lens or (1,) * len(table))
    slots = compose_slots(np.repeat(table, lens, axis=0), positions[:, None], size)[:, 0]
    ends = np.cumsum(lens)
    seq_lens = positions[ends - 1] + 1
    if group.sliding_window is not None:
        first = np.maximum(positions[ends - lens] + 1 - group.sliding_window, 0) // size
        seq_lens = seq_lens - first * size
        width = -(-int(seq_lens.max()) // size)
        columns = np.minimum(first[:, None] + np.arange(width), table.shape[1] - 1)
        table = np.take_along_axis(table, columns, axis=1)
    max_seq_len = int(seq_lens.max())
    return DecodeMetadata(
        block_table=mx.array(table[:, : -(-max_seq_len // size)]),
        seq_lens=mx.array(seq_lens.astype(np.int32)),
        slot_mapping=mx.array(slots),
        offset=offset,
        max_seq_len=max_seq_len,
        query_lens=tuple(query_lens),
    )


def prefill_chunk(
    group: AttentionGroup,
    table: np.ndarray,  # int32 [N]
    start: int,
    query_len: int,
) -> PrefillMetadata:
    """`prefill_metadata` for one group."""
    size, end = group.block_size, start + query_len
    [slots] = compose_slots(table[None], np.arange(start, end)[None], size)
    first = 0
    if group.sliding_window is not None:
        first = max(start + 1 - group.sliding_window, 0) // size
    return PrefillMetadata(
        block_table=mx.array(table[None, first : -(-end // size)]),
        slot_mapping=mx.array(slots),
        context_len=start - first * size,
        query_len=query_len,
        skipped=first * size,
    )


def state_rows(
    group: StateGroup,
    table: np.ndarray,  # int32 [B, N]
    positions: np.ndarray,  # int32 [B], of the new tokens
) -> StateMetadata:
    """`decode_metadata` for one group of recurrent states."""
    rows = np.arange(len(positions))
    return _read_and_write(
        table[rows, _entry(group, positions - 1)], table[rows, _entry(group, positions)], False
    )


def state_chunk(
    group: StateGroup,
    table: np.ndarray,  # int32 [N]
    start: int,
    query_len: int,
) -> StateMetadata:
    """`prefill_metadata` for one group of recurrent states."""
    last = np.array([start - 1, start + query_len - 1])
    read, write = table[_entry(group, last)]
    return _read_and_write(np.array([read]), np.array([write]), begins=start == 0)


def _entry(group: StateGroup, positions: np.ndarray) -> np.ndarray:
    """Entry of the block table that has the state after the token at each position."""
    return np.maximum(positions, 0) // (group.block_size or _NO_LIMIT)


def _read_and_write(read: np.ndarray, write: np.ndarray, begins: bool) -> StateMetadata:
    read_ids = mx.array(read)
    same = np.array_equal(read, write)
    return StateMetadata(read_ids, read_ids if same else mx.array(write), begins)


def _offset(positions: np.ndarray) -> mx.array | int:
    """The positions as `DecodeMetadata.offset`: a plain int where there is one request."""
    return int(positions[0]) if len(positions) == 1 else mx.array(positions)
