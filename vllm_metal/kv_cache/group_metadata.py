"""From block tables to the metadata of every KV group.

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


def decode_metadata(
    groups: Sequence[KVGroup],
    block_tables: Sequence[np.ndarray],  # int32 [B, N] for each group
    positions: np.ndarray,  # int32 [B], of the new tokens
) -> tuple[GroupMetadata, ...]:
    """For a `(B, 1)` forward: one new token for each request."""
    offset = int(positions[0]) if len(positions) == 1 else mx.array(positions)
    return tuple(
        StateMetadata(mx.array(table[:, 0]), begins=False)
        if isinstance(group, StateGroup)
        else _decode_group(group, table, positions, offset)
        for group, table in zip(groups, block_tables, strict=True)
    )


def prefill_metadata(
    groups: Sequence[KVGroup],
    block_tables: Sequence[np.ndarray],  # int32 [N] for each group
    start: int,
    query_len: int,
) -> tuple[GroupMetadata, ...]:
    """For a `(1, L)` forward: tokens start .. start + query_len - 1 of one request."""
    return tuple(
        StateMetadata(mx.array(table[:1]), begins=start == 0)
        if isinstance(group, StateGroup)
        else _prefill_group(group, table, start, query_len)
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


def _decode_group(
    group: AttentionGroup, table: np.ndarray, positions: np.ndarray, offset: mx.array | int
) -> DecodeMetadata:
    size = group.block_size
    slots = compose_slots(table, positions[:, None], size)[:, 0]
    seq_lens = positions + 1
    if group.sliding_window is not None:
        first = np.maximum(seq_lens - group.sliding_window, 0) // size
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
    )


def _prefill_group(
    group: AttentionGroup, table: np.ndarray, start: int, query_len: int
) -> PrefillMetadata:
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
