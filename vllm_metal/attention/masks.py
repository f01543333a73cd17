"""Causal masks by position, for models that compute attention themselves.

Backends mask by position on their own and need none of these.
"""

import mlx.core as mx

from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata


def causal_mask(metadata: AttentionMetadata, window: int | None = None) -> mx.array:
    """True where a query sees a key: bool [L, S] of a chunk, [B, 1, 1, S] of decode rows.

    S counts the tokens of the longest request. Made once for all layers of a forward pass.

    Args:
        metadata: of the forward pass.
        window: how many tokens a query sees at most, its own included; all if None.
    """

    def mask() -> mx.array:
        keys = mx.arange(metadata.max_seq_len)
        if isinstance(metadata, DecodeMetadata):
            queries = (metadata.seq_lens - 1)[:, None, None, None]
        else:
            queries = mx.arange(metadata.context_len, metadata.seq_len)[:, None]
        seen = keys <= queries
        return seen if window is None else seen & (keys > queries - window)

    return metadata.derived.once(("causal_mask", window), mask)
