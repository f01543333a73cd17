"""Causal masks by position: the one rule of which keys a query sees."""

import mlx.core as mx

from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata


def seen_keys(
    rows: mx.array,  # L positions of queries, of any shape
    first: int,
    count: int,
    sliding_window: int | None,
) -> mx.array:  # [L, count] bool
    """Which of the keys at positions first .. first + count - 1 each query sees."""
    rows, keys = rows.reshape(-1, 1), mx.arange(first, first + count)[None, :]
    seen = keys <= rows
    if sliding_window is not None:
        seen = seen & (keys > rows - sliding_window)
    return seen


def causal_mask(metadata: AttentionMetadata, window: int | None = None) -> mx.array:
    """The mask for a model that computes attention itself; a backend needs none.

    True where a query sees a key: bool [L, S] for a chunk, [T, 1, 1, S] for decode rows. S counts
    the tokens of the longest request. All layers of a forward pass share it.

    Args:
        metadata: what the forward pass tells the layer.
        window: how many tokens a query sees at most, its own included; all if None.
    """

    return metadata.once(_causal_mask, window)


def _causal_mask(metadata: AttentionMetadata, window: int | None) -> mx.array:
    if isinstance(metadata, DecodeMetadata):
        seen = seen_keys(metadata.rows.seq_lens - 1, 0, metadata.max_seq_len, window)
        return seen[:, None, None, :]
    rows = mx.arange(metadata.context_len, metadata.seq_len)
    return seen_keys(rows, 0, metadata.max_seq_len, window)
