"""Causal attention over gathered keys and values on MLX operations, and its mask for decode."""

from abc import abstractmethod
from dataclasses import replace
from fractions import Fraction

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Chunk, ChunkMemory, Pages
from vllm_metal.attention.broken_tokens import confined
from vllm_metal.attention.masks import seen_keys
from vllm_metal.attention.metadata import DecodeMetadata

SCORE_TILE_BYTES = {mx.cpu: 8 << 20, mx.gpu: 128 << 20}
"""Bound on one tile of prefill scores where MLX has no fused attention: on its CPU backend, and on
a GPU for most head sizes and in float32."""

FUSED_HEAD_SIZES = (64, 80, 128)
"""Equal head sizes of keys and values for which MLX's GPU backends, Metal and CUDA alike, attend to
16-bit chunks without holding their scores."""


class ChunkAttention(AttentionBackend):
    """A backend whose chunks attend to their own keys and values as they are, where they may."""

    def prefill(self, pages: Pages, chunk: Chunk) -> mx.array:
        if not self.reproducible:
            keys, values = confined(chunk.keys, chunk.values)
            chunk = replace(chunk, keys=keys, values=values)
        if not (self.reproducible or chunk.metadata.context_len):
            return attend_to_itself(chunk, self.shape.sliding_window)
        return self.prefill_with_context(pages, chunk)

    @abstractmethod
    def prefill_with_context(self, pages: Pages, chunk: Chunk) -> mx.array:
        """`prefill` of a chunk that reads pages: its context, or its own tokens."""


def valid_tokens(
    metadata: DecodeMetadata, block_size: int, sliding_window: int | None = None
) -> mx.array:
    """[B, 1, Q, N * block_size] bool, true where a new token sees a gathered one.

    Each request has the same number Q of new tokens.

    All layers of one block size and window share it.
    """
    return metadata.once(_valid_tokens, block_size, sliding_window)


def _valid_tokens(
    metadata: DecodeMetadata, block_size: int, sliding_window: int | None
) -> mx.array:
    num_tokens, query_len = metadata.block_table.shape[1] * block_size, metadata.query_len
    positions = metadata.seq_lens[:, None] - mx.arange(query_len, 0, -1)
    seen = seen_keys(positions, 0, num_tokens, sliding_window)
    return seen.reshape(-1, 1, query_len, num_tokens)


def causal_attention(
    queries: mx.array,  # [1, Hq, L, Dk]
    keys: mx.array,  # [1, H, S, Dk], the last L tokens being the queries' own
    values: mx.array,  # [1, H, S, Dv]
    scale: float,
    sinks: mx.array | None,
    sliding_window: int | None = None,
) -> mx.array:  # [1, Hq, L, Dv]
    """Causal attention in the type of the queries, in row tiles where MLX would hold all scores."""
    heads, query_len, seq_len = queries.shape[1], queries.shape[2], keys.shape[2]
    context_len = seq_len - query_len
    rows = query_len
    if not _is_fused(queries, values):
        rows = scored_rows(query_len, seq_len, heads)
    tiles: list[mx.array] = []
    for start in range(0, query_len, rows):
        end = min(start + rows, query_len)
        first, visible = 0, context_len + end
        mask: mx.array | str = "causal"
        if sliding_window is not None and visible > sliding_window:
            first = max(0, context_len + start + 1 - sliding_window)
            positions = mx.arange(context_len + start, context_len + end)
            mask = seen_keys(positions, first, visible - first, sliding_window)
        tile = queries[:, :, start:end]
        if tiles:  # one after the other, or MLX allocates the scores of all tiles at once
            [tile] = mx.depends([tile], tiles[-1:])
        tiles.append(
            mx.fast.scaled_dot_product_attention(
                tile,
                keys[:, :, first:visible],
                values[:, :, first:visible],
                scale=scale,
                mask=mask,
                sinks=sinks,
            )
        )
    out = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=2)
    return out.astype(queries.dtype)  # MLX attends in the widest of the three types


def attend_to_itself(chunk: Chunk, sliding_window: int | None) -> mx.array:  # [Hq, L, Dv]
    """Causal attention of a chunk over its own keys and values alone, exact."""
    own = chunk.queries[None], chunk.keys[None], chunk.values[None]
    return causal_attention(*own, chunk.scale, chunk.sinks, sliding_window).squeeze(0)


def _is_fused(queries: mx.array, values: mx.array) -> bool:
    fused_sizes = queries.shape[-1] == values.shape[-1] in FUSED_HEAD_SIZES
    return _device_type() == mx.gpu and queries.dtype.size == 2 and fused_sizes


def causal_memory(
    query_len: int,
    seq_len: int,
    num_heads: int,
    sliding_window: int | None,
    held: Fraction = Fraction(1),
) -> ChunkMemory:
    """The memory that `causal_attention` holds at a time. Where it is fused, scores take none.

    Args:
        query_len: tokens of the chunk.
        seq_len: tokens that it attends over, its own included.
        num_heads: query heads.
        sliding_window: tokens that a query sees; None for all.
        held: part of the heads that one call is given.
    """
    rows = scored_rows(query_len, seq_len, int(num_heads * held))
    if _device_type() == mx.gpu:
        return ChunkMemory(query_len, seq_len, rows, held=held)
    copies = 1 if sliding_window is None else 2  # before and after an explicit mask
    return ChunkMemory(query_len, seq_len, rows, copies * 4 * num_heads, held)


def scored_rows(query_len: int, seq_len: int, num_heads: int) -> int:
    """Rows of one tile of `causal_attention` where it is not fused."""
    tile_bytes = SCORE_TILE_BYTES[_device_type()]
    return min(query_len, max(1, tile_bytes // (4 * num_heads * seq_len)))


def _device_type() -> mx.DeviceType:
    return mx.default_device().type


def softmax_with_sinks(
    scores: mx.array,  # [B, H, G, Q, S]
    sinks: mx.array | None,  # [H * G]
) -> mx.array:
    """Softmax over S; a sink is one more logit of its head, without a value."""
    if sinks is None:
        return mx.softmax(scores, axis=-1)
    heads = sinks.astype(scores.dtype).reshape(1, *scores.shape[1:3], 1, 1)
    column = mx.broadcast_to(heads, (*scores.shape[:-1], 1))
    return mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
