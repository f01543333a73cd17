"""The attention backend: what a page holds, how keys and values enter it, how queries read it.

A backend belongs to one layer. It holds constants only; the pages belong to
`vllm_metal.kv_cache.cache.KVCache`, which passes them in and keeps what `store` returns, so that
MLX can write them in place.

Letters: B requests, T new tokens, Q new tokens of a request, Hq query heads, H KV heads, Dk and Dv
head sizes, L query tokens, S tokens of the longest request, N blocks of a block table.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import NamedTuple

import mlx.core as mx

from vllm_metal.attention.broken_tokens import confined
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata


@dataclass(frozen=True)
class LayerShape:
    """The shape of one attention layer, as a dry forward finds it: all that the cache needs."""

    num_kv_heads: int
    head_size: int
    """Dk, elements of one key."""
    head_size_v: int
    """Dv, elements of one value; 0 where a layer caches one array only."""
    fetched: bool = False
    """Whether the model computes on its cached keys and values, so that they are fetched from the
    pages; otherwise the backend attends."""
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None for all."""


@dataclass(frozen=True)
class Chunk:
    """The inputs of one layer's attention in a prefill: one chunk of one prompt."""

    queries: mx.array
    """[Hq, L, Dk]."""
    keys: mx.array
    """[H, L, Dk], the chunk's own, exact."""
    values: mx.array
    """[H, L, Dv], the chunk's own, exact."""
    metadata: PrefillMetadata
    scale: float
    """Factor of the scores."""
    sinks: mx.array | None = None
    """[Hq], a logit of each head that takes weight and gives no value."""


@dataclass(frozen=True)
class Rows:
    """The inputs of one layer's attention in a decode step."""

    queries: mx.array
    """[T, Hq, Dk], or [B, Q, Hq, Dk] of requests with equally many new tokens."""
    metadata: DecodeMetadata
    scale: float
    """Factor of the scores."""
    sinks: mx.array | None = None
    """[Hq], a logit of each head that takes weight and gives no value."""


class Pages(NamedTuple):
    """The pages of one layer."""

    array: mx.array
    """[num_blocks, page], elements of `AttentionBackend.page_dtype`."""
    token: mx.array | None = None
    """An array that the last `store` returned and that every reader takes, so that MLX runs the
    reader after the store. None for a backend whose `store` returns a new array of pages, which
    orders the readers by itself."""


@dataclass(frozen=True)
class ChunkMemory:
    """How much of a prefill chunk's attention exists at a time in one layer."""

    query_len: int
    """L."""
    tokens: int
    """Tokens whose keys and values are gathered."""
    scored_rows: int
    """Query tokens whose scores of all `tokens` exist."""
    score_bytes: int = 0
    """Bytes that the scores of one query token and one key take in all heads, at least; 0 where
    that is measured."""
    held: Fraction = Fraction(1)
    """Part of the heads that is gathered and scored at a time; more than 1 where another layer's
    are held beside a layer's own."""

    @property
    def whole_tokens(self) -> int:
        """Tokens of all heads that take as much as `tokens` of the heads held."""
        return ceil(self.tokens * self.held)


class AttentionBackend(ABC):
    """Paged attention of one layer."""

    name: str
    """Shown to the user, e.g. `dense bfloat16`."""
    format_names: tuple[str, str] | None = None
    """Names of the key and the value format of compressed pages; None for dense pages."""
    stores_through: bool = False
    """Whether `store` writes into the memory of its array, however many holders the array has."""
    page_dtype: mx.Dtype
    """Element type of the array of pages."""
    reproducible: bool = False
    """Whether a prefill chunk reads its own keys and values as the pages have them."""

    def __init__(self, shape: LayerShape, block_size: int):
        self.shape = shape
        self.block_size = block_size

    @property
    def compressed(self) -> bool:
        """Whether pages hold fewer bytes than the keys and values themselves; for reports."""
        return self.format_names is not None

    @property
    @abstractmethod
    def slot_size(self) -> int:
        """Bytes that one KV head of one token occupies, keys and values together."""

    @property
    @abstractmethod
    def page_size_bytes(self) -> int:
        """Bytes of one block in this layer, unused ones at its end included."""

    @property
    def bits_per_element(self) -> float:
        """Stored bits of a key or value coordinate, metadata included, unused bytes not."""
        return 8 * self.slot_size / (self.shape.head_size + self.shape.head_size_v)

    def first_token(self) -> mx.array | None:
        """The `Pages.token` of pages to which nothing has been stored yet."""
        return None

    @abstractmethod
    def store(
        self,
        pages: Pages,
        keys: mx.array,  # [T, H, Dk]
        values: mx.array,  # [T, H, Dv]
        metadata: AttentionMetadata,
    ) -> Pages:
        """Writes T tokens to their slots. The caller drops the pages it passed in.

        The output of every query that sees a token with a NaN or infinite element in its key or
        value is NaN in the KV heads concerned, and no other output is touched: see `broken_tokens`.
        """

    def decode(self, pages: Pages, rows: Rows) -> mx.array:  # [T, Hq, Dv]
        """Each query attends over the tokens of its request up to its own, that included.

        Queries of one request share one reading of its context.
        """
        parts = rows.metadata.parts
        ends = list(accumulate(part.slot_mapping.shape[0] for part in parts))
        divided = mx.split(rows.queries, ends[:-1]) if len(parts) > 1 else [rows.queries]
        outputs = []
        for part, queries in zip(parts, divided, strict=True):
            by_request = queries.reshape(-1, part.query_len, *queries.shape[1:])
            some = replace(rows, queries=by_request, metadata=part)
            outputs.append(self.decode_part(pages, some).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    @abstractmethod
    def decode_part(self, pages: Pages, rows: Rows) -> mx.array:  # [B, Q, Hq, Dv]
        """`decode` for requests with equally many new tokens, the last Q of each."""

    @abstractmethod
    def prefill(self, pages: Pages, chunk: Chunk) -> mx.array:  # [Hq, L, Dv]
        """The chunk attends over its context in the pages and causally over itself."""

    @abstractmethod
    def read(self, pages: Pages, metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
        """Keys [B, H, N * block_size, Dk] and values [B, H, N * block_size, Dv] in the pages.

        B counts the rows of the block table.

        What lies beyond a request's length is arbitrary. The elements have any float type.
        """

    def fetch(
        self,
        pages: Pages,
        keys: mx.array,  # [B, H, L, Dk], of the forward itself, stored before
        values: mx.array,  # [B, H, L, Dv]
        metadata: AttentionMetadata,
    ) -> tuple[mx.array, mx.array]:  # [B, H, S, Dk], [B, H, S, Dv]
        """Returns all keys and values of the requests, in the type of the new ones.

        A prefill chunk gets its own as they are, unless `reproducible`. A token whose key or value
        is not finite has a key of NaN and a value of zeros (`broken_tokens`). Rows of shorter
        requests end in zeros, so that a masked token adds nothing even where an earlier owner of
        its block left a NaN.
        """
        if isinstance(metadata, DecodeMetadata):
            metadata = metadata.rows  # the model attends row by row
        context_len = metadata.max_seq_len
        if isinstance(metadata, PrefillMetadata) and not self.reproducible:
            context_len = metadata.context_len
            keys, values = confined(keys, values)
        if not context_len:
            return keys, values
        stored_keys, stored_values = self.read(pages, metadata)
        return (
            _joined(stored_keys, keys, context_len, metadata),
            _joined(stored_values, values, context_len, metadata),
        )

    def chunk_memory(self, query_len: int, seq_len: int, num_heads: int) -> ChunkMemory:
        """Memory of a chunk of `query_len` tokens that ends at `seq_len`, for the memory plan."""
        if self.shape.sliding_window is not None:
            begins_in = self.block_size - 1  # a window may begin anywhere in a block
            held = self.shape.sliding_window + query_len - 1 + begins_in
            seq_len = min(seq_len, held)
        if self.shape.fetched:
            return ChunkMemory(query_len, seq_len, query_len)
        return self.attended_memory(query_len, seq_len, num_heads)

    @abstractmethod
    def attended_memory(self, query_len: int, seq_len: int, num_heads: int) -> ChunkMemory:
        """`chunk_memory` where `prefill` attends: what it gathers and scores at a time."""


def _joined(
    stored: mx.array,  # [B, H, N * block_size, D], as the pages have them
    new: mx.array,  # [B, H, L, D], of the forward itself
    context_len: int,
    metadata: AttentionMetadata,
) -> mx.array:  # [B, H, S, D]
    """The first `context_len` stored tokens, and after them the new ones that they lack.

    Of a layer that caches one array, the values have no elements. They are not computed: MLX's
    CUDA backend divides by the number of elements of a fused operation, which ends the process.
    """
    if not new.shape[-1]:
        return mx.zeros((*new.shape[:2], metadata.max_seq_len, 0), new.dtype)
    stored = stored[:, :, :context_len].astype(new.dtype)
    if isinstance(metadata, PrefillMetadata):
        exact = new[:, :, context_len - metadata.context_len :]
        return mx.concatenate([stored, exact], axis=2)
    if metadata.is_ragged:
        written = causal_mask(metadata).swapaxes(2, 3)
        return mx.where(written, stored, mx.zeros((), new.dtype))
    return stored
