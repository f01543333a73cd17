"""What one forward pass tells the attention layers.

Lengths follow vLLM:

    |<--------------------- seq_len --------------------->|
    |<----- context_len ----->|<-------- query_len ------>|
      tokens already in pages     tokens of this forward

Letters: B requests, L query tokens of a prefill chunk, N blocks of the longest request.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class _StepArrays:
    """Index arrays that a backend derives from the metadata once and all layers share."""

    arrays: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.arrays:
            self.arrays[key] = make()
        return self.arrays[key]


@dataclass(frozen=True)
class DecodeMetadata:
    """One new token for each of B requests, run as one `(B, 1)` forward."""

    block_table: mx.array
    """[B, N] int32, block ids of each request; entries beyond its length are any valid ids."""
    seq_lens: mx.array
    """[B] int32, tokens of each request, the new one included."""
    slot_mapping: mx.array
    """[B] int32, `block_id * block_size + offset` of each new token."""
    offset: mx.array | int
    """Position of the new token: [B] int32, or a plain int when B is 1."""
    max_seq_len: int
    """Largest entry of `seq_lens`, or more; just that where `offset` is an int."""
    derived: _StepArrays = field(default_factory=_StepArrays)

    @property
    def is_ragged(self) -> bool:
        """Whether a request may be shorter than `max_seq_len`."""
        return not isinstance(self.offset, int)


@dataclass(frozen=True)
class PrefillMetadata:
    """One chunk of one prompt, run as one `(1, L)` forward."""

    block_table: mx.array
    """[1, N] int32, block ids that cover context and chunk."""
    slot_mapping: mx.array
    """[L] int32, slot of each token of the chunk."""
    context_len: int
    """Tokens of the request that are already in pages: earlier chunks, prefix-cache hits."""
    query_len: int
    """L."""
    derived: _StepArrays = field(default_factory=_StepArrays)

    @property
    def offset(self) -> int:
        return self.context_len

    @property
    def seq_len(self) -> int:
        return self.context_len + self.query_len

    @property
    def max_seq_len(self) -> int:
        return self.seq_len


AttentionMetadata = DecodeMetadata | PrefillMetadata
