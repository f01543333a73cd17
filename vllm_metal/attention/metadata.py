"""The metadata of one forward pass: what its attention layers need besides keys and values.

Lengths follow vLLM:

    |<--------------------- seq_len --------------------->|
    |<----- context_len ----->|<-------- query_len ------>|
      tokens already in pages     tokens of this forward

Letters: B requests, T rows of a decode step, L query tokens of a prefill chunk, N blocks of the
longest request.

Layers are in groups that share a block table, and each group has metadata of its own. In a group
of sliding-window layers a request begins at the first block that its window touches: `seq_len` and
`context_len` count from there, `offset` from the beginning of the request.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Self, TypeVar, TypeVarTuple

import mlx.core as mx
import numpy as np

Derived = TypeVar("Derived")
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True)
class _SharedByLayers:
    """Metadata that remembers what its layers derive from it."""

    _derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once(
        self,
        derive: Callable[[Self, *Arguments], Derived],
        *arguments: *Arguments,
    ) -> Derived:
        """`derive(self, *arguments)`, computed for the first layer that asks and kept for the rest.

        Args:
            derive: a function at the level of its module: a closure would be another one in each
                layer, and nothing would be shared.
            arguments: hashable; equal arguments are the same question.
        """
        question = derive, *arguments
        if question not in self._derived:
            self._derived[question] = derive(self, *arguments)
        return self._derived[question]


@dataclass(frozen=True)
class DecodeMetadata(_SharedByLayers):
    """The new tokens of B requests, run as one `(T, 1)` forward: a row for each new token.

    A request has one new token, or several where drafts are verified. Those are neighbouring rows,
    at positions that follow each other.
    """

    block_table: mx.array
    """[B, N] int32, block ids of each request; entries beyond its length are any valid ids."""
    seq_lens: mx.array
    """[B] int32, tokens of each request, all its new ones included."""
    slot_mapping: mx.array
    """[T] int32, where each new token is stored (see `slots`)."""
    offset: mx.array | int
    """Position of each new token: [T] int32, or a plain int when T is 1."""
    max_seq_len: int
    """Largest entry of `seq_lens`, or more; just that where `offset` is an int."""
    query_lens: tuple[int, ...] = ()
    """New tokens of each request; () where each has one, so that T is B."""

    @property
    def is_ragged(self) -> bool:
        """Whether a row may see fewer tokens than `max_seq_len`."""
        return not isinstance(self.offset, int)

    @property
    def query_len(self) -> int:
        """New tokens of each request, where all have equally many, as in one of the `parts`."""
        return self.query_lens[0] if self.query_lens else 1

    @property
    def parts(self) -> "tuple[DecodeMetadata, ...]":
        """Neighbouring requests with equally many new tokens, which attend in one operation."""
        return self.once(_parts)

    @property
    def rows(self) -> "DecodeMetadata":
        """Each row as a request of its own, for models that attend themselves."""
        return self.once(_rows)


def _parts(metadata: DecodeMetadata) -> tuple[DecodeMetadata, ...]:
    if len(set(metadata.query_lens)) < 2:
        return (metadata,)
    parts, request, row = [], 0, 0
    for query_lens in (tuple(group) for _, group in groupby(metadata.query_lens)):
        requests = slice(request, request + len(query_lens))
        rows = slice(row, row + sum(query_lens))
        parts.append(
            DecodeMetadata(
                metadata.block_table[requests],
                metadata.seq_lens[requests],
                metadata.slot_mapping[rows],
                mx.array(metadata.offset)[rows],
                metadata.max_seq_len,
                query_lens,
            )
        )
        request, row = requests.stop, rows.stop
    return tuple(parts)


def _rows(metadata: DecodeMetadata) -> DecodeMetadata:
    if set(metadata.query_lens) <= {1}:
        return metadata
    lens = np.array(metadata.query_lens)
    request = mx.array(np.repeat(np.arange(len(lens)), lens))
    later = mx.array(np.concatenate([np.arange(count)[::-1] for count in lens]).astype(np.int32))
    return DecodeMetadata(
        metadata.block_table[request],
        metadata.seq_lens[request] - later,
        metadata.slot_mapping,
        metadata.offset,
        metadata.max_seq_len,
    )


@dataclass(frozen=True)
class PrefillMetadata(_SharedByLayers):
    """One chunk of one prompt, run as one `(1, L)` forward."""

    block_table: mx.array
    """[1, N] int32, block ids that cover context and chunk."""
    slot_mapping: mx.array
    """[L] int32, where each token of the chunk is stored (see `slots`)."""
    context_len: int
    """Tokens of the request that are already in pages: earlier chunks, prefix-cache hits."""
    query_len: int
    """L."""
    skipped: int = 0
    """Tokens before the first block of `block_table`, which no window reaches any more."""

    @property
    def offset(self) -> int:
        """Position of the chunk's first token in the request."""
        return self.skipped + self.context_len

    @property
    def seq_len(self) -> int:
        return self.context_len + self.query_len

    @property
    def max_seq_len(self) -> int:
        return self.seq_len


AttentionMetadata = DecodeMetadata | PrefillMetadata


@dataclass(frozen=True)
class StateMetadata:
    """The blocks that hold the recurrent states of the requests.

    A state that the prefix cache keeps is never written again. So a forward pass may read the state
    of a request in one block and write the new one to another.
    """

    read_ids: mx.array
    """[B] int32, the block of each request's state before this forward pass."""
    write_ids: mx.array
    """[B] int32, the block that gets the state after it; often the same."""
    begins: bool
    """Whether this forward begins the request, so that there is no state yet."""


GroupMetadata = AttentionMetadata | StateMetadata
"""The metadata of one forward pass for the layers of one group."""
