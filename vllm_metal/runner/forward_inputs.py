"""The inputs of a forward pass, from the batch's rows: token ids and the metadata of each group."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.group_metadata import (
    decode_metadata,
    gathered_tokens,
    prefill_metadata,
)
from vllm_metal.kv_cache.groups import KVGroup
from vllm_metal.runner.segments import Segment, in_row_order


def split_decode(
    segments: Sequence[Segment], groups: Sequence[KVGroup], most_tokens: int, most_rows: int
) -> list[list[Segment]]:
    """Decode segments by forward pass, each of which gathers `most_tokens` tokens of a layer.

    Each row of a pass counts as one that gathers all tokens of its request, as it does where the
    model attends itself. All segments run as one pass if they have few enough rows and tokens.
    Otherwise requests of similar lengths run together, the longest first.
    """

    def fitting(longest: int) -> int:
        tokens = gathered_tokens(groups, longest)
        return min(most_rows, most_tokens // tokens) if tokens else most_rows

    if sum(s.length for s in segments) <= fitting(max(s.end for s in segments)):
        return [in_row_order(segments)]
    parts: list[list[Segment]] = []
    room = num_rows = 0
    for segment in sorted(segments, key=lambda segment: (-segment.end, segment.row)):
        if not parts or num_rows + segment.length > room:
            room, num_rows = fitting(segment.end), 0
            parts.append([])
        parts[-1].append(segment)
        num_rows += segment.length
    return [in_row_order(part) for part in parts]


def decode_inputs(
    rows: InputBatch,
    segments: Sequence[Segment],
    groups: Sequence[KVGroup],
    pending: tuple[mx.array, dict[str, int]] | None,
) -> tuple[mx.array, tuple[GroupMetadata, ...]]:
    """Inputs of a `(T, 1)` forward: the newest token of each request, and its drafts after it.

    Args:
        rows: vLLM's batch.
        segments: of the requests that decode, in the order of the forward's rows.
        groups: of the KV cache.
        pending: tokens of the previous step that are still being computed, and the index in them
            of each request; they are used lazily.

    Returns:
        token ids [T, 1] and the metadata of each group.
    """
    decode_rows = [segment.row for segment in segments]
    positions = np.array([p for s in segments for p in range(s.first, s.end)], np.int32)
    query_lens = tuple(segment.length for segment in segments)
    token_ids = _newest_tokens(rows, segments, pending)
    tables = [rows.block_table[i].block_table.np[decode_rows] for i in range(len(groups))]
    several = query_lens if max(query_lens) > 1 else ()
    return token_ids[:, None], decode_metadata(groups, tables, positions, several)


def prefill_inputs(
    rows: InputBatch, row: int, query_len: int, groups: Sequence[KVGroup]
) -> tuple[mx.array, tuple[GroupMetadata, ...]]:
    """Inputs of a `(1, L)` forward: the next `query_len` tokens of one request.

    Returns:
        token ids [1, L] and the metadata of each group.
    """
    start = int(rows.num_computed_tokens_cpu[row])
    tables = [rows.block_table[i].block_table.np[row] for i in range(len(groups))]
    token_ids = mx.array(rows.token_ids_cpu[row, start : start + query_len])
    return token_ids[None], prefill_metadata(groups, tables, start, query_len)


def _newest_tokens(
    rows: InputBatch,
    segments: Sequence[Segment],
    pending: tuple[mx.array, dict[str, int]] | None,
) -> mx.array:  # [T] int32
    """The newest token of each request, and its drafts; what is pending stays lazy.

    A step that has drafts is not built before the tokens of the previous one are known.
    """
    decode_rows, firsts = [s.row for s in segments], [s.first for s in segments]
    newest = rows.token_ids_cpu[decode_rows, firsts]
    if pending is None:
        known = [(t, *s.drafts) for t, s in zip(newest.tolist(), segments, strict=True)]
        return mx.array(np.array([t for of_request in known for t in of_request], np.int32))
    tokens, index_of = pending
    indices = [index_of.get(segment.req_id, -1) for segment in segments]
    if indices == list(range(tokens.shape[0])):
        return tokens
    index = mx.array(indices)
    return mx.where(index >= 0, tokens[mx.maximum(index, 0)], mx.array(newest))
