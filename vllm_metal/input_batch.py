"""From the batch's rows to what one forward pass takes: token ids and attention metadata."""

import mlx.core as mx
import numpy as np
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata


def decode_inputs(
    rows: InputBatch,
    decode_rows: list[int],
    block_size: int,
    pending: tuple[mx.array, dict[str, int]] | None,
) -> tuple[mx.array, DecodeMetadata]:
    """Inputs of a `(B, 1)` forward: the newest token of each of `decode_rows`.

    Args:
        rows: vLLM's batch.
        decode_rows: rows that advance by one token, in the order of the forward's rows.
        block_size: tokens of a block.
        pending: tokens of the previous step that are still being computed, and the index in them
            of each request; they are used lazily.

    Returns:
        token ids [B, 1] and the metadata.
    """
    positions = rows.num_computed_tokens_cpu[decode_rows]
    seq_lens = positions + 1
    max_seq_len = int(seq_lens.max())
    num_blocks = -(-max_seq_len // block_size)
    block_table = rows.block_table[0].block_table.np[decode_rows, :num_blocks]
    blocks = block_table[np.arange(len(decode_rows)), positions // block_size]
    slots = blocks * block_size + positions % block_size
    token_ids = mx.array(rows.token_ids_cpu[decode_rows, positions])
    if pending is not None:
        token_ids = _take_pending(token_ids, [rows.req_ids[row] for row in decode_rows], *pending)
    metadata = DecodeMetadata(
        block_table=mx.array(block_table),
        seq_lens=mx.array(seq_lens.astype(np.int32)),
        slot_mapping=mx.array(slots.astype(np.int32)),
        offset=int(positions[0]) if len(decode_rows) == 1 else mx.array(positions),
        max_seq_len=max_seq_len,
    )
    return token_ids[:, None], metadata


def prefill_inputs(
    rows: InputBatch, row: int, query_len: int, block_size: int
) -> tuple[mx.array, PrefillMetadata]:
    """Inputs of a `(1, L)` forward: the next `query_len` tokens of one request.

    Returns:
        token ids [1, L] and the metadata.
    """
    start = int(rows.num_computed_tokens_cpu[row])
    positions = np.arange(start, start + query_len)
    block_table = rows.block_table[0].block_table.np[row]
    slots = block_table[positions // block_size] * block_size + positions % block_size
    num_blocks = -(-(start + query_len) // block_size)
    metadata = PrefillMetadata(
        block_table=mx.array(block_table[None, :num_blocks]),
        slot_mapping=mx.array(slots.astype(np.int32)),
        context_len=start,
        query_len=query_len,
    )
    return mx.array(rows.token_ids_cpu[row, positions])[None], metadata


def _take_pending(
    token_ids: mx.array, req_ids: list[str], pending: mx.array, index_of: dict[str, int]
) -> mx.array:
    """Replaces the placeholder of each pending request by its lazy token."""
    indices = [index_of.get(req_id, -1) for req_id in req_ids]
    if indices == list(range(pending.shape[0])):
        return pending
    index = mx.array(indices)
    return mx.where(index >= 0, pending[mx.maximum(index, 0)], token_ids)
