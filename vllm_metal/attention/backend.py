"""The attention backend: what a page holds, how K/V enter it, how queries read it.

A backend instance belongs to one layer. It holds constants only; the pages belong to
`vllm_metal.kv_cache.cache.KVCache`, which passes them in and rebinds what `store` returns, so
that MLX can write them in place.

Letters: T new tokens, Hq query heads, H KV heads, Dk and Dv head sizes, L query tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata


@dataclass(frozen=True)
class LayerShape:
    """What the cache must know of one attention layer, read off a dry forward."""

    num_kv_heads: int
    head_size: int
    """Dk, elements of one key."""
    head_size_v: int
    """Dv, elements of one value."""


Pages = Any
"""A tuple of `mx.array`, as `allocate` made it. Only its backend looks inside."""


class AttentionBackend(ABC):
    """Paged attention of one layer."""

    name: str
    """Shown to the user, e.g. `dense bfloat16`."""
    compressed: bool = False
    """Whether pages hold fewer bytes than the keys and values themselves; for reports."""

    def __init__(self, shape: LayerShape, block_size: int):
        self.shape = shape
        self.block_size = block_size

    @property
    @abstractmethod
    def slot_size(self) -> int:
        """Bytes that one KV head of one token occupies, keys and values together."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block in this layer."""
        return self.block_size * self.shape.num_kv_heads * self.slot_size

    @abstractmethod
    def allocate(self, num_blocks: int) -> Pages:
        """Pages for `num_blocks` blocks: exactly `num_blocks * page_size_bytes` bytes."""

    @abstractmethod
    def store(
        self,
        pages: Pages,
        keys: mx.array,  # [T, H, Dk]
        values: mx.array,  # [T, H, Dv]
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        """Writes T tokens to their slots. The caller drops the pages it passed in."""

    def copy_blocks(self, pages: Pages, source: mx.array, destination: mx.array) -> None:
        """Copies blocks [C] to blocks [C] within the arrays of `pages`."""
        for array in pages:
            blocks = array[source]
            mx.eval(blocks)  # read before the write, or MLX copies the whole array
            array[destination] = blocks

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
    def prefill_workspace_bytes(self, context_len: int, query_len: int, num_heads: int) -> int:
        """Temporary memory that `prefill` needs for its context, beyond the model's own."""
