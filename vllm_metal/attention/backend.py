"""The attention backend: what a page holds, how K/V enter it, how queries read it.

A backend instance belongs to one layer. It holds constants only; the pages belong to
`vllm_metal.kv_cache.cache.KVCache`, which passes them in and rebinds what `store` returns, so
that MLX can write them in place.

Letters: B requests, T new tokens, Hq query heads, H KV heads, Dk and Dv head sizes, L query
tokens, S tokens of the longest request, N blocks of a block table.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata


@dataclass(frozen=True)
class LayerShape:
    """What the cache must know of one attention layer, read off a dry forward."""

    num_kv_heads: int
    head_size: int
    """Dk, elements of one key."""
    head_size_v: int
    """Dv, elements of one value; 0 where a layer caches one array only."""
    fetched: bool = False
    """Whether the model computes on its cached keys and values, so that they are fetched from the
    pages; else the backend attends."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None: all."""


@dataclass(frozen=True)
class PrefillChunk:
    """How much of a prefill's attention exists at a time in one layer."""

    query_len: int
    """L."""
    tokens: int
    """Tokens whose keys and values are gathered."""
    scored_rows: int
    """Query tokens whose scores of all `tokens` exist."""
    score_bytes: int = 0
    """What the scores of one query token and one key take, at least; 0 where that is measured."""


class Pages(NamedTuple):
    """The pages of one layer."""

    array: mx.array
    """[num_blocks, page], elements of `AttentionBackend.page_dtype`."""
    token: mx.array | None = None
    """What the last `store` returned to order the reads after it; None for a backend whose `store`
    returns a new array, which orders them by itself."""


class AttentionBackend(ABC):
    """Paged attention of one layer."""

    name: str
    """Shown to the user, e.g. `dense bfloat16`."""
    compressed: bool = False
    """Whether pages hold fewer bytes than the keys and values themselves; for reports."""
    stores_through: bool = False
    """Whether `store` writes through the array that it is given, whoever else holds it."""
    page_dtype: mx.Dtype
    """Element type of the array of pages."""
    reproducible: bool = False
    """Whether a prefill chunk reads its own keys and values as the pages have them."""

    def __init__(self, shape: LayerShape, block_size: int, page_bytes: int = 0):
        self.shape = shape
        self.block_size = block_size
        self._page_bytes = page_bytes

    @property
    def format_names(self) -> tuple[str, str]:
        """Key and value format, where `compressed`."""
        raise NotImplementedError(f"{self.name} has no formats")

    @property
    @abstractmethod
    def slot_size(self) -> int:
        """Bytes that one KV head of one token occupies, keys and values together."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block in this layer, unused ones at its end included."""
        return self._page_bytes or self.block_size * self.shape.num_kv_heads * self.slot_size

    def first_token(self) -> mx.array | None:
        """The `Pages.token` of pages to which nothing has been stored yet."""
        return None

    @abstractmethod
    def store(
        self,
        pages: Pages,
        keys: mx.array,  # [T, H, Dk]
        values: mx.array,  # [T, H, Dv]
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        """Writes T tokens to their slots. The caller drops the pages it passed in."""

    @abstractmethod
    def decode(
        self,
        pages: Pages,
        queries: mx.array,  # [B, Hq, Dk]
        metadata: DecodeMetadata,
        scale: float,
        sinks: mx.array | None,  # [Hq]
    ) -> mx.array:  # [B, Hq, Dv]
        """Each query attends over all tokens of its request, the new one included."""

    @abstractmethod
    def prefill(
        self,
        pages: Pages,
        queries: mx.array,  # [Hq, L, Dk]
        keys: mx.array,  # [H, L, Dk], of the chunk itself, exact
        values: mx.array,  # [H, L, Dv]
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,  # [Hq]
    ) -> mx.array:  # [Hq, L, Dv]
        """The chunk attends over its context in the pages and causally over itself."""

    @abstractmethod
    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        """Keys [B, H, N * block_size, Dk] and values [B, H, N * block_size, Dv] in the pages.

        What lies beyond a request's length is anything, of any float type.
        """

    def fetch(
        self,
        pages: Pages,
        keys: mx.array,  # [B, H, L, Dk], of the forward itself, stored before
        values: mx.array,  # [B, H, L, Dv]
        metadata: AttentionMetadata,
    ) -> tuple[mx.array, mx.array]:  # [B, H, S, Dk], [B, H, S, Dv]
        """All keys and values of the requests, in the type of the new ones.

        A prefill chunk gets its own as they are, unless `reproducible`. Rows of shorter requests
        end in zeros, so that a masked token adds nothing even where an earlier owner of its block
        left a NaN.
        """
        context_len = metadata.max_seq_len
        if isinstance(metadata, PrefillMetadata) and not self.reproducible:
            context_len = metadata.context_len
        if not context_len:
            return keys, values
        fetched = []
        for stored, new in zip(self.read(pages, metadata), (keys, values), strict=True):
            stored = stored[:, :, :context_len].astype(new.dtype)
            if isinstance(metadata, PrefillMetadata):
                exact = new[:, :, context_len - metadata.context_len :]
                stored = mx.concatenate([stored, exact], axis=2)
            elif metadata.is_ragged:
                written = causal_mask(metadata).swapaxes(2, 3)
                stored = mx.where(written, stored, mx.zeros((), new.dtype))
            fetched.append(stored)
        return tuple(fetched)

    def largest_chunk(self, query_len: int, seq_len: int, num_heads: int) -> PrefillChunk:
        """What a chunk of `query_len` tokens at the end of `seq_len` takes, for the memory plan."""
        if self.shape.sliding_window is not None:
            begins_in = self.block_size - 1  # a window may begin anywhere in a block
            held = self.shape.sliding_window + query_len - 1 + begins_in
            seq_len = min(seq_len, held)
        if self.shape.fetched:
            return PrefillChunk(query_len, seq_len, query_len)
        return self.attended_chunk(query_len, seq_len, num_heads)

    @abstractmethod
    def attended_chunk(self, query_len: int, seq_len: int, num_heads: int) -> PrefillChunk:
        """`largest_chunk` where `prefill` attends: what it gathers and scores at a time."""
