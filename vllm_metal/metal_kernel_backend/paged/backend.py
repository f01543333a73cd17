"""Backends on the kernels, whatever their pages hold.

A layer's pages are the array and the token of its last store, which orders the store before
every reader (see `launcher`). Decode reads the pages where they are. Prefill has its context
copied out of them once, as plain keys and values and for as many KV heads at a time as a bounded
tile holds, and hands it to MLX's attention: a tile is shared by all rows of the chunk and all query
heads of its KV heads, and a row needs the whole context of a head but of one head only, so nothing
is merged. Two tiles exist at a time, of one layer or of two: see `tiles_in_flight`.
"""

from dataclasses import replace
from fractions import Fraction

import mlx.core as mx

from vllm_metal.attention.backend import Chunk, ChunkMemory, Pages, Rows
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import (
    ChunkAttention,
    causal_attention,
    causal_memory,
)
from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants
from vllm_metal.metal_kernel_backend.paged.launcher import PageLauncher
from vllm_metal.metal_kernel_backend.paged.small_arrays import lengthened
from vllm_metal.metal_kernel_backend.paged.tiles_in_flight import MOST_TILES, TilesInFlight

TILE_BYTES = 64 << 20
"""Bound on the keys and values of a tile in plain form. One KV head is the least: in 16 bits with
head size 128 it reaches the bound at 131,072 tokens."""


class KernelAttention(ChunkAttention):
    """Paged attention on kernels. A subclass sets what is declared here."""

    stores_through = True
    launcher: PageLauncher
    constants: LayerConstants
    plain_dtype: mx.Dtype
    """Element type of the keys and values that `read` gives."""

    def first_token(self) -> mx.array:
        return self.launcher.no_token()

    def store(
        self, pages: Pages, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> Pages:
        slots = metadata.once(_slot_mapping)
        arguments = pages.array, keys, values, slots, self.constants
        return Pages(pages.array, self.launcher.store(*arguments, pages.token))

    def decode_part(self, pages: Pages, rows: Rows) -> mx.array:
        metadata = rows.metadata
        return self.launcher.decode(
            pages.array,
            rows.queries,
            metadata.once(_block_table),
            metadata.once(_seq_lens),
            self.constants,
            rows.scale,
            metadata.max_seq_len,
            _token(pages),
            rows.sinks,
            self.shape.sliding_window or 0,
        )

    def prefill_with_context(self, pages: Pages, chunk: Chunk) -> mx.array:
        _, count = self._visible(chunk.metadata)
        group = chunk.queries.shape[0] // self.shape.num_kv_heads
        tiles: list[mx.array] = []
        for heads in self._head_tiles(count, chunk.queries.dtype.size):
            rows = slice(heads.start * group, heads.stop * group)
            keys, values = self._plain(pages, chunk, heads)
            tile = causal_attention(
                chunk.queries[None, rows],
                keys,
                values,
                chunk.scale,
                None if chunk.sinks is None else chunk.sinks[rows],
                self.shape.sliding_window,
            ).squeeze(0)
            chunk.metadata.once(_tiles_in_flight).add(tile)
            tiles.append(tile)
        return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)

    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        batch, blocks = metadata.block_table.shape
        count = blocks * self.block_size
        keys, values = self.launcher.read(
            pages.array,
            metadata.block_table.reshape(-1),
            self.constants,
            0,
            batch * count,
            _token(pages),
            self.plain_dtype,
        )

        def requests_first(part: mx.array) -> mx.array:
            heads = self.shape.num_kv_heads
            return part.reshape(heads, batch, count, -1).swapaxes(0, 1)

        return requests_first(keys), requests_first(values)

    def attended_memory(self, query_len: int, seq_len: int, num_heads: int) -> ChunkMemory:
        first_tile = self._head_tiles(seq_len, itemsize=2)[0]
        held = Fraction(first_tile.stop, self.shape.num_kv_heads)
        tile = causal_memory(query_len, seq_len, num_heads, self.shape.sliding_window, held)
        return replace(tile, held=MOST_TILES * held)

    def _head_tiles(self, count: int, itemsize: int) -> list[slice]:
        """KV heads whose `count` plain tokens are held at a time."""
        heads = self.shape.num_kv_heads
        head_bytes = count * itemsize * (self.shape.head_size + self.shape.head_size_v)
        each = max(1, TILE_BYTES // head_bytes)
        return [slice(head, min(head + each, heads)) for head in range(0, heads, each)]

    def _visible(self, metadata: PrefillMetadata) -> tuple[int, int]:
        """First token that a row of the chunk sees, rounded down to even, and tokens from there."""
        window = self.shape.sliding_window or metadata.seq_len
        first = max(0, metadata.context_len + 1 - window) // 2 * 2
        return first, metadata.seq_len - first

    def _plain(
        self, pages: Pages, chunk: Chunk, heads: slice
    ) -> tuple[mx.array, mx.array]:  # [1, heads, S, Dk], [1, heads, S, Dv]
        """The context that the chunk sees, then the chunk: exact, or as stored."""
        metadata = chunk.metadata
        first, count = self._visible(metadata)
        keys, values = self.launcher.read(
            pages.array,
            metadata.once(_request_blocks),
            self.constants,
            first,
            count,
            _token(pages),
            chunk.queries.dtype,
            heads,
        )
        if not self.reproducible:
            keys[:, count - metadata.query_len :] = chunk.keys[heads]
            values[:, count - metadata.query_len :] = chunk.values[heads]
        return keys[None], values[None]


def _tiles_in_flight(_: PrefillMetadata) -> TilesInFlight:
    return TilesInFlight()


def _slot_mapping(metadata: AttentionMetadata) -> mx.array:
    return lengthened(metadata.slot_mapping, filler=-1)


def _block_table(metadata: DecodeMetadata) -> mx.array:
    return lengthened(metadata.block_table, filler=0)


def _seq_lens(metadata: DecodeMetadata) -> mx.array:
    return lengthened(metadata.seq_lens, filler=0)


def _request_blocks(metadata: PrefillMetadata) -> mx.array:
    """Blocks of the one request."""
    return lengthened(metadata.block_table.squeeze(0), filler=0)


def _token(pages: Pages) -> mx.array:
    """The token that a reader of the pages takes, so that it runs after their last store."""
    assert pages.token is not None, "these pages belong to a backend without tokens"
    return pages.token
