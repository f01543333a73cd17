"""Requests whose K/V a test knows in full, fed to a backend in chunks and in decode steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from tests import reference
from vllm_metal.attention.backend import AttentionBackend, Chunk, LayerShape, Pages, Rows
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.attention.slots import compose_slots
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_rows, prefill_chunk
from vllm_metal.kv_cache.groups import AttentionGroup

BLOCK = 16
GROUPED = LayerShape(num_kv_heads=2, head_size=64, head_size_v=64)

FIELDS = ("queries", "keys", "values")
Types = mx.Dtype | Mapping[str, mx.Dtype]
"""The element type of a request's arrays: one for all, or one for each of `FIELDS`."""


@dataclass
class Request:
    """One request in one layer; everything that the backend is told comes from here."""

    queries: np.ndarray
    """[Hq, S, Dk] float32"""
    keys: np.ndarray
    """[H, S, Dk] float32"""
    values: np.ndarray
    """[H, S, Dv] float32"""
    block_ids: list[int]
    scale: float
    sinks: np.ndarray | None = None
    """[Hq] float32"""
    sliding_window: int | None = None

    @property
    def seq_len(self) -> int:
        return self.keys.shape[1]

    def slots(self, block_size: int) -> np.ndarray:
        """Slot of each token."""
        positions = np.arange(self.seq_len)
        return compose_slots(np.array([self.block_ids]), positions[None], block_size)[0]

    def expected(self, start: int, end: int) -> np.ndarray:  # [Hq, end - start, Dv]
        """The oracle's attention of tokens `start` to `end`."""
        return reference.attention(
            self.queries[:, start:end],
            self.keys[:, :end],
            self.values[:, :end],
            self.scale,
            self.sinks,
            self.sliding_window or 0,
        )


class PagedLayer:
    """A backend and its pages, in a cache of one layer. Block ids come in no particular order."""

    def __init__(self, backend: AttentionBackend, num_blocks: int = 64, seed: int = 0):
        self.backend = backend
        self.group = AttentionGroup(
            backend.block_size, layers=(0,), sliding_window=backend.shape.sliding_window
        )
        self.kv_cache = KVCache([backend], num_blocks)
        self.rng = np.random.default_rng(seed)
        self._free = list(self.rng.permutation(np.arange(1, num_blocks)))

    @property
    def pages(self) -> Pages:
        return self.kv_cache.pages(0)

    def request(
        self,
        seq_len: int,
        num_heads: int,
        sinks: bool = False,
        block_ids: list[int] | None = None,
    ) -> Request:
        """A request of Gaussian K/V, owning blocks of this layer."""
        shape: LayerShape = self.backend.shape
        if block_ids is None:
            num_blocks = -(-seq_len // self.backend.block_size)
            block_ids = [int(self._free.pop()) for _ in range(num_blocks)]
        return Request(
            self._normal(num_heads, seq_len, shape.head_size),
            self._normal(shape.num_kv_heads, seq_len, shape.head_size),
            self._normal(shape.num_kv_heads, seq_len, shape.head_size_v),
            block_ids,
            shape.head_size**-0.5,
            self._normal(num_heads) if sinks else None,
            shape.sliding_window,
        )

    def prefill(self, request: Request, start: int, end: int, dtype: Types = mx.float32):
        """Stores tokens `start` to `end` as one chunk; their attention, [Hq, L, Dv]."""
        metadata, dtypes = self.chunk(request, start, end), _each(dtype)
        keys = mx.array(request.keys[:, start:end], dtypes["keys"])
        values = mx.array(request.values[:, start:end], dtypes["values"])
        self.kv_cache.store(0, keys.swapaxes(0, 1), values.swapaxes(0, 1), metadata)
        queries = mx.array(request.queries[:, start:end], dtypes["queries"])
        sinks = _sinks(request, queries.dtype)
        chunk = Chunk(queries, keys, values, metadata, request.scale, sinks)
        out = self.backend.prefill(self.pages, chunk)
        self.kv_cache.evaluate(out)
        return out

    def decode(
        self,
        requests: Sequence[Request],
        dtype: Types = mx.float32,
        padding: int = 0,
        lens: Sequence[int] | None = None,
        query_lens: Sequence[int] = (),
    ) -> mx.array:  # [T, Hq, Dv]
        """Stores the last token of each request, or the last few, and attends from them.

        Args:
            padding: block id that fills the unused entries of the block table.
            lens: tokens of each request so far; all of them if not given.
            query_lens: how many of its last tokens each request stores; one if not given.
        """
        lens = [request.seq_len for request in requests] if lens is None else lens
        metadata, dtypes = self.rows(requests, lens, padding, query_lens), _each(dtype)
        counts = query_lens or (1,) * len(requests)

        def newest(field: str) -> mx.array:
            rows = [
                getattr(request, field)[:, position]
                for request, seq_len, count in zip(requests, lens, counts, strict=True)
                for position in range(seq_len - count, seq_len)
            ]
            return mx.array(np.stack(rows), dtypes[field])

        self.kv_cache.store(0, newest("keys"), newest("values"), metadata)
        queries, first = newest("queries"), requests[0]
        rows = Rows(queries, metadata, first.scale, _sinks(first, queries.dtype))
        out = self.backend.decode(self.pages, rows)
        self.kv_cache.evaluate(out)
        return out

    def chunk(self, request: Request, start: int, end: int) -> PrefillMetadata:
        """Tokens `start` to `end` of a request as one chunk."""
        table = np.array(request.block_ids, np.int32)
        return prefill_chunk(self.group, table, start, end - start)

    def rows(
        self,
        requests: Sequence[Request],
        lens: Sequence[int],
        padding: int = 0,
        query_lens: Sequence[int] = (),
    ) -> DecodeMetadata:
        """The last of `lens` tokens of each request, or the last few, as one decode step."""
        block_size = self.backend.block_size
        longest = max(-(-seq_len // block_size) for seq_len in lens)
        table = np.full((len(requests), longest), padding, np.int32)
        for row, (request, seq_len) in enumerate(zip(requests, lens, strict=True)):
            block_ids = request.block_ids[: -(-seq_len // block_size)]
            table[row, : len(block_ids)] = block_ids
        counts = query_lens or (1,) * len(requests)
        new = [np.arange(n - count, n) for n, count in zip(lens, counts, strict=True)]
        positions = np.concatenate(new).astype(np.int32)
        return decode_rows(self.group, table, positions, query_lens=query_lens)

    def expected_decode(
        self, requests: Sequence[Request], lens: Sequence[int] | None = None
    ) -> np.ndarray:  # [B, Hq, Dv]
        """The oracle's answer to `decode`."""
        lens = [request.seq_len for request in requests] if lens is None else lens
        return np.stack(
            [r.expected(end - 1, end)[:, 0] for r, end in zip(requests, lens, strict=True)]
        )

    def _normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32)


def _each(dtype: Types) -> Mapping[str, mx.Dtype]:
    return dict.fromkeys(FIELDS, dtype) if isinstance(dtype, mx.Dtype) else dtype


def _sinks(request: Request, dtype: mx.Dtype) -> mx.array | None:
    return None if request.sinks is None else mx.array(request.sinks, dtype)


def error(out: mx.array, expected: np.ndarray, *requests: Request) -> float:
    """Largest difference as a part of the largest value; NaN stays NaN and fails a comparison."""
    largest = max(np.abs(request.values).max() for request in requests)
    return float(np.abs(np.array(out.astype(mx.float32)) - expected).max() / (largest or 1.0))


def fill(layer: PagedLayer, request: Request, chunk: int = 2 * BLOCK) -> None:
    """Prefills all tokens but the last, which `decode` brings."""
    for start in range(0, request.seq_len - 1, chunk):
        layer.prefill(request, start, min(start + chunk, request.seq_len - 1))
