"""TurboQuant pages behind the attention boundary, on the fused kernels.

A layer's pages are the array and the token of its last store, which orders the store before
every reader (see `launcher`). Decode reads the compressed pages. Prefill attends over its context
in the rotated space, dequantised by tiles of a bounded size: each row of a chunk would otherwise
dequantise the context again, and a tile is shared by all rows and heads.
"""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape, Pages, PrefillChunk
from vllm_metal.attention.masks import seen_keys
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout

TILE_BYTES = 64 << 20
"""Bound on the scores of one tile of a context, and on the tile itself."""

MIN_TILE_TOKENS = 256
"""Tokens of a tile at least, whatever its scores take."""

LOWEST_SCORE = -1e30
"""Largest score before the first token: finite, so that a row that sees nothing yet stays one."""


@cache
def shared_launcher(layout: SlotLayout, target: Target) -> Launcher:
    """One launcher for all layers of a layout."""
    return Launcher(layout, target)


class TurboQuantFused(TurboQuantAttention):
    """The kernels of `target`."""

    stores_through = True

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: tuple[Format, Format],
        constants: KeyConstants,
        target: Target,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, formats, constants, reproducible, page_bytes)
        self.launcher = shared_launcher(self.layout, target)
        self.name += f" ({target.name} kernels)"
        self._constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        array, *token = pages
        arguments = array, keys, values, metadata.slot_mapping, self._constants
        return array, self.launcher.store(*arguments, *token)

    def decode(
        self,
        pages: Pages,
        queries: mx.array,
        metadata: DecodeMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        array, token = pages
        return self.launcher.decode(
            array,
            queries[:, None],
            metadata.block_table,
            metadata.seq_lens,
            self._constants,
            scale,
            metadata.max_seq_len,
            token,
            sinks,
            self.shape.sliding_window or 0,
        )[:, 0]

    def _prefill_compressed(
        self,
        pages: Pages,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        rotated = self.key_codec.rotate_queries(queries.swapaxes(0, 1)).swapaxes(0, 1)
        rotated = (rotated * scale).reshape(self.shape.num_kv_heads, -1, rotated.shape[-1])
        rows = _Rows(metadata.context_len, metadata.query_len, self.shape.sliding_window)
        state = _SoftmaxState.empty(rotated, rows, self.shape.head_size_v)
        for first, count in self._tiles(metadata.context_len, *queries.shape[:2]):
            stored = self._stored(pages, metadata, first, count)
            state = state.update(rotated, *stored, first).evaluated()
        own_keys, own_values = self._chunk(pages, keys, values, metadata)
        for first, count in self._tiles(metadata.query_len, *queries.shape[:2]):
            own = slice(first, first + count)
            position = metadata.context_len + first
            state = state.update(rotated, own_keys[:, own], own_values[:, own], position)
            state = state.evaluated()
        if sinks is not None:
            state = state.with_sinks(sinks, rotated, self.key_codec.rotated_centre)
        out = state.output().reshape(*queries.shape[:2], -1)
        return self.value_codec.unrotate_outputs(out).astype(queries.dtype)

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        array, token = pages
        batch, blocks = metadata.block_table.shape
        count = blocks * self.block_size
        parts = self.launcher.dequantize(
            array,
            metadata.block_table.reshape(-1),
            self._constants,
            0,
            batch * count,
            token,
            mx.float32,
        )
        return tuple(
            part.reshape(self.shape.num_kv_heads, batch, count, -1).swapaxes(0, 1) for part in parts
        )

    def attended_chunk(self, query_len: int, seq_len: int, num_heads: int) -> PrefillChunk:
        tile = self._tile_tokens(num_heads, query_len)
        scores_and_weights = 2 * 4 * num_heads
        return PrefillChunk(query_len, min(seq_len, tile), query_len, scores_and_weights)

    def _tiles(self, length: int, num_heads: int, query_len: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each tile of a run of tokens; first tokens are even."""
        tokens = self._tile_tokens(num_heads, query_len)
        starts = range(0, length, tokens)
        return [(start, min(tokens, length - start)) for start in starts]

    def _tile_tokens(self, num_heads: int, query_len: int) -> int:
        vector_bytes = 4 * (self.shape.head_size + self.shape.head_size_v)
        token_bytes = max(4 * num_heads * query_len, vector_bytes * self.shape.num_kv_heads)
        return max(MIN_TILE_TOKENS, TILE_BYTES // token_bytes // 2 * 2)

    def _stored(
        self, pages: Pages, metadata: PrefillMetadata, first: int, count: int
    ) -> tuple[mx.array, mx.array]:  # [H, count, D] each
        """Rotated keys and values of a run of tokens as the pages have them."""
        array, token = pages
        table = metadata.block_table[0]
        arguments = array, table, self._constants, first, count, token, mx.float32
        return self.launcher.dequantize(*arguments, rotated=True)

    def _chunk(
        self, pages: Pages, keys: mx.array, values: mx.array, metadata: PrefillMetadata
    ) -> tuple[mx.array, mx.array]:  # [H, L, D] each
        """Rotated keys and values of the chunk itself: exact, or as stored."""
        if not self.reproducible:
            rotated = self.key_codec.rotate_keys(keys.swapaxes(0, 1)).swapaxes(0, 1)
            return rotated, self.value_codec.rotate_values(values)
        odd = metadata.context_len % 2
        first, count = metadata.context_len - odd, metadata.query_len + odd
        stored_keys, stored_values = self._stored(pages, metadata, first, count)
        return stored_keys[:, odd:], stored_values[:, odd:]


@dataclass(frozen=True)
class _Rows:
    """Where the query rows of a chunk stand."""

    context_len: int
    query_len: int
    """L."""
    sliding_window: int | None

    def seen(self, first: int, count: int) -> mx.array | None:
        """Which keys first .. first + count - 1 each row sees, bool [L, count]; None: all."""
        last = self.context_len + self.query_len - 1
        hidden = self.sliding_window is not None and last - self.sliding_window >= first
        if first + count <= self.context_len + 1 and not hidden:
            return None
        positions = mx.arange(self.context_len, last + 1)
        return seen_keys(positions, first, count, self.sliding_window)


@dataclass(frozen=True)
class _SoftmaxState:
    """Attention of query rows over the tokens seen so far, not yet normalised."""

    rows: _Rows
    top: mx.array
    """[H, G * L, 1], largest score."""
    total: mx.array
    """[H, G * L, 1], sum of exp(score - top)."""
    out: mx.array
    """[H, G * L, Dv], sum of exp(score - top) * value."""

    @classmethod
    def empty(cls, queries: mx.array, rows: _Rows, value_size: int) -> "_SoftmaxState":
        shape = queries.shape[:2]
        top = mx.full((*shape, 1), LOWEST_SCORE)
        return cls(rows, top, mx.zeros((*shape, 1)), mx.zeros((*shape, value_size)))

    def update(
        self,
        queries: mx.array,  # [H, G * L, Dk], query heads outermost
        keys: mx.array,  # [H, S, Dk]
        values: mx.array,  # [H, S, Dv]
        first: int,  # position of the first key
    ) -> "_SoftmaxState":
        scores = queries @ keys.swapaxes(1, 2)
        seen = self.rows.seen(first, keys.shape[1])
        if seen is not None:
            group = scores.reshape(scores.shape[0], -1, *seen.shape)
            scores = mx.where(seen, group, -mx.inf).reshape(scores.shape)
        return self._add(mx.max(scores, axis=-1, keepdims=True), scores, values)

    def with_sinks(
        self, sinks: mx.array, queries: mx.array, rotated_centre: mx.array
    ) -> "_SoftmaxState":
        """Each sink [Hq] is a logit without a value. Stored keys lack their centre, so do sinks."""
        heads, rows, _ = queries.shape
        logits = sinks.astype(mx.float32).reshape(heads, -1, 1)
        logits = mx.repeat(logits, rows // logits.shape[1], axis=1)
        logits = logits - mx.sum(queries * rotated_centre[:, None], axis=-1, keepdims=True)
        return self._add(logits, logits, mx.zeros((heads, 1, self.out.shape[-1])))

    def evaluated(self) -> "_SoftmaxState":
        """Itself. Left to later, MLX would hold all tiles of a context at a time."""
        mx.eval(self.top, self.total, self.out)
        return self

    def output(self) -> mx.array:
        return self.out / self.total

    def _add(self, largest: mx.array, scores: mx.array, values: mx.array) -> "_SoftmaxState":
        top = mx.maximum(self.top, largest)
        before, weights = mx.exp(self.top - top), mx.exp(scores - top)
        total = self.total * before + mx.sum(weights, axis=-1, keepdims=True)
        return _SoftmaxState(self.rows, top, total, self.out * before + weights @ values)
