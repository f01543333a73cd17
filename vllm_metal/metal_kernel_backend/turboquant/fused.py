"""TurboQuant pages behind the attention boundary, on the fused kernels.

A layer's pages are the array and the token of its last store, which orders the store before
every reader (see `launcher`). Decode reads the compressed pages. Prefill dequantises its context
once, for as many KV heads at a time as a bounded tile holds, and hands it to MLX's attention: a
tile is shared by all rows of the chunk and all query heads of its KV heads, and a row needs the
whole context of a head but of one head only, so nothing is merged.
"""

from dataclasses import replace
from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape, Pages, PrefillChunk
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import causal_attention, causal_chunk
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

TILE_BYTES = 128 << 20
"""Bound on the keys and values that a chunk has in plain form at a time. One KV head is the least:
in 16 bits with head size 128 it reaches the bound at 262,144 tokens."""


@cache
def shared_launcher(layout: PageLayout, target: Target) -> Launcher:
    """One launcher for all layers of a layout."""
    return Launcher(layout, target)


class TurboQuantFused(TurboQuantAttention):
    """The kernels of `target`."""

    stores_through = True

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: FormatPair,
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
        _, count = self._visible(metadata)
        group = queries.shape[0] // self.shape.num_kv_heads
        tiles = []
        for heads in self._head_tiles(count, queries.dtype.size):
            rows = slice(heads.start * group, heads.stop * group)
            tiles.append(
                causal_attention(
                    queries[None, rows],
                    *self._plain(pages, keys, values, metadata, heads, queries.dtype),
                    scale,
                    None if sinks is None else sinks[rows],
                    self.shape.sliding_window,
                )[0]
            )
            mx.eval(tiles[-1])  # left to later, MLX would hold all tiles at a time
        return tiles[0] if len(tiles) == 1 else mx.concatenate(tiles)

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
        held = self._head_tiles(seq_len, itemsize=2)[0].stop
        heads = self.shape.num_kv_heads
        tile = causal_chunk(
            query_len, seq_len, num_heads * held // heads, self.shape.sliding_window
        )
        # the plan counts tokens of all heads
        return replace(
            tile, tokens=-(-seq_len * held // heads), score_bytes=tile.score_bytes * heads // held
        )

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
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        heads: slice,
        dtype: mx.Dtype,
    ) -> list[mx.array]:  # [1, heads, S, Dk], [1, heads, S, Dv]
        """What the chunk sees of its context, dequantised, and the chunk: exact, or as stored."""
        array, token = pages
        first, count = self._visible(metadata)
        arguments = array, metadata.block_table[0], self._constants, first, count, token
        plain = []
        for stored, own in zip(
            self.launcher.dequantize(*arguments, dtype, heads), (keys, values), strict=True
        ):
            if not self.reproducible:
                stored[:, count - metadata.query_len :] = own[heads]
            plain.append(stored[None])
        return plain
