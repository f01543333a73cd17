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


def split_decode(
    rows: InputBatch, decode_rows: list[int], groups: Sequence[KVGroup], most_tokens: int
) -> list[list[int]]:
    """Decode rows by forward pass, each of which gathers `most_tokens` tokens of a layer at most.

    All rows run as one pass if that gathers few enough tokens. Otherwise requests of similar
    lengths run together, the longest first.
    """
    lens = rows.num_computed_tokens_cpu[decode_rows] + 1
    if len(decode_rows) * gathered_tokens(groups, int(lens.max())) <= most_tokens:
        return [decode_rows]
    order = np.argsort(-lens, kind="stable")
    parts = []
    while len(order):
        count = max(1, most_tokens // gathered_tokens(groups, int(lens[order[0]])))
        parts.append([decode_rows[i] for i in order[:count]])
        order = order[count:]
    return parts


def decode_inputs(
    rows: InputBatch,
    decode_rows: list[int],
    groups: Sequence[KVGroup],
    pending: tuple[mx.array, dict[str, int]] | None,
) -> tuple[mx.array, tuple[GroupMetadata, ...]]:
    """Inputs of a `(B, 1)` forward: the newest token of each of `decode_rows`.

    Args:
        rows: vLLM's batch.
        decode_rows: rows that advance by one token, in the order of the forward's rows.
        groups: of the KV cache.
        pending: tokens of the previous step that are still being computed, and the index in them
            of each request; they are used lazily.

    Returns:
        token ids [B, 1] and the metadata of each group.
    """
    positions = rows.num_computed_tokens_cpu[decode_rows]
    token_ids = _newest_tokens(rows, decode_rows, positions, pending)
    tables = [rows.block_table[i].block_table.np[decode_rows] for i in range(len(groups))]
    return token_ids[:, None], decode_metadata(groups, tables, positions)


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
    decode_rows: list[int],
    positions: np.ndarray,
    pending: tuple[mx.array, dict[str, int]] | None,
) -> mx.array:  # [B] int32
    """Tokens at `positions`; those that are pending stay lazy."""
    if pending is None:
        return mx.array(rows.token_ids_cpu[decode_rows, positions])
    tokens, index_of = pending
    indices = [index_of.get(rows.req_ids[row], -1) for row in decode_rows]
    if indices == list(range(tokens.shape[0])):
        return tokens
    index = mx.array(indices)
    known = mx.array(rows.token_ids_cpu[decode_rows, positions])
    return mx.where(index >= 0, tokens[mx.maximum(index, 0)], known)
