"""TurboQuant pages behind the attention boundary, on the fused kernels.

A layer's pages are the array and the token of its last store, which orders the store before
every reader (see `launcher`). Decode reads the compressed pages. Prefill attends over its context
in the rotated space, dequantised by tiles of a bounded size: each row of a chunk would otherwise
dequantise the context again, and a tile is shared by all rows and heads.
"""

from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape, Pages
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


@cache
def shared_launcher(layout: SlotLayout, target: Target) -> Launcher:
    """One launcher for all layers of a layout."""
    return Launcher(layout, target)


class TurboQuantFused(TurboQuantAttention):
    """The kernels of `target`."""

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: tuple[Format, Format],
        constants: KeyConstants,
        target: Target,
        reproducible: bool = False,
    ):
        super().__init__(shape, block_size, formats, constants, reproducible)
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

    def copy_blocks(self, pages: Pages, source: mx.array, destination: mx.array) -> None:
        super().copy_blocks(pages[:1], source, destination)

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
        state = _SoftmaxState.empty(rotated, self.shape.head_size_v)
        for first, count in self._tiles(metadata.context_len, *queries.shape[:2]):
            state = state.update(rotated, *self._stored(pages, metadata, first, count)).evaluated()
        own_keys, own_values = self._chunk(pages, keys, values, metadata)
        for first, count in self._tiles(metadata.query_len, *queries.shape[:2]):
            own = slice(first, first + count)
            length = metadata.query_len
            state = state.update(rotated, own_keys[:, own], own_values[:, own], length, first)
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

    def attention_workspace_bytes(self, context_len: int, query_len: int, num_heads: int) -> int:
        sizes = self.shape.head_size + self.shape.head_size_v
        rows = 4 * query_len * num_heads
        tile = max(TILE_BYTES, rows * MIN_TILE_TOKENS)
        outputs = rows * (self.shape.head_size + 6 * self.shape.head_size_v)
        return 8 * tile + outputs + 8 * query_len * self.shape.num_kv_heads * sizes

    def _tiles(self, length: int, num_heads: int, query_len: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each tile of a run of tokens; first tokens are even."""
        vector_bytes = 4 * (self.shape.head_size + self.shape.head_size_v)
        token_bytes = max(4 * num_heads * query_len, vector_bytes * self.shape.num_kv_heads)
        tokens = max(MIN_TILE_TOKENS, TILE_BYTES // token_bytes // 2 * 2)
        starts = range(0, length, tokens)
        return [(start, min(tokens, length - start)) for start in starts]

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


class _SoftmaxState:
    """Attention of query rows over the tokens seen so far, not yet normalised."""

    def __init__(self, top: mx.array, total: mx.array, out: mx.array):
        self.top = top  # [H, rows, 1], largest score
        self.total = total  # [H, rows, 1], sum of exp(score - top)
        self.out = out  # [H, rows, Dv], sum of exp(score - top) * value

    @classmethod
    def empty(cls, queries: mx.array, value_size: int) -> "_SoftmaxState":
        heads, rows, _ = queries.shape
        top = mx.full((heads, rows, 1), -mx.inf)
        return cls(top, mx.zeros((heads, rows, 1)), mx.zeros((heads, rows, value_size)))

    def update(
        self,
        queries: mx.array,  # [H, G * L, Dk], query heads outermost
        keys: mx.array,  # [H, S, Dk]
        values: mx.array,  # [H, S, Dv]
        query_len: int = 0,  # L: row i of L sees those of the chunk's keys that come up to i
        first: int = 0,  # ... and the first key here is this one of the chunk
    ) -> "_SoftmaxState":
        scores = queries @ keys.swapaxes(1, 2)
        if query_len:
            row = mx.arange(queries.shape[1])[:, None] % query_len
            seen = mx.arange(first, first + keys.shape[1])[None, :] <= row
            scores = mx.where(seen, scores, -mx.inf)
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
        return _SoftmaxState(top, total, self.out * before + weights @ values)
