"""Groups of layers and regions of memory, as vLLM's planner lays a cache out.

Layers of one group share a block table. Layers of different groups may occupy the same bytes,
because a block id belongs to one group at a time. Such a stretch of memory is a region, with the
pages of its blocks one after another.

                region 0        region 1                     block 3, say, is given to group 1
    group 0     layer 2         layer 5                      -> it holds tokens of layers 0 and 3,
    group 1     layer 0         layer 3                         at the same place in both regions
    group 2     layer 1         layer 4

Layers are numbered in model order; recurrent states have numbers of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.state_shape import StateShape


@dataclass(frozen=True)
class AttentionGroup:
    """Attention layers with one block table."""

    block_size: int
    """Tokens of a block."""
    layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    """Tokens that the layers see; None for all."""

    def describe(self) -> str:
        """Text for reports, to stand after a number of groups."""
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{len(self.layers)} layers ({self.block_size} tokens{window})"


@dataclass(frozen=True)
class StateGroup:
    """Recurrent states with one block table.

    Where prefixes are cached, entry p of the table is the block with the state after
    (p + 1) * `block_size` tokens, or with the newest state if it is the last entry. All other
    entries may be vLLM's null block: states in between are not kept.
    """

    states: tuple[int, ...]
    block_size: int | None = None
    """Tokens from one entry of the block table to the next; None where one block holds the newest
    state of a request, whatever its length."""
    blocks_held: int = 1
    """Blocks that a running request holds: its newest state, and where prefixes are cached also the
    state that the running step reads."""
    spare_blocks: int = 0
    """Blocks that have to be free besides, for copies of those in which a cached prefix ends."""

    def describe(self) -> str:
        """Text for reports, to stand after a number of groups."""
        return f"{len(self.states)} states"


KVGroup = AttentionGroup | StateGroup


@dataclass(frozen=True)
class Region:
    """Memory that some layers share, one of each group at most."""

    page_bytes: int
    """Bytes of a block."""
    layers: tuple[int, ...] = ()
    states: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheLayout:
    """Everything that decides where a layer's bytes are."""

    groups: tuple[KVGroup, ...]
    regions: tuple[Region, ...]

    @classmethod
    def separate(
        cls, backends: Sequence[AttentionBackend], states: Sequence[StateShape]
    ) -> "CacheLayout":
        """A region for every layer, so that requests may own the same block ids in all groups.

        This serves callers without a scheduler. Layers of one window and one block size are a
        group, in the order of their first layers; recurrent states are the last one.
        """
        kinds: dict[tuple[int, int | None], list[int]] = {}
        for layer, backend in enumerate(backends):
            kind = backend.block_size, backend.shape.sliding_window
            kinds.setdefault(kind, []).append(layer)
        groups: list[KVGroup] = [
            AttentionGroup(block_size, tuple(layers), window)
            for (block_size, window), layers in kinds.items()
        ]
        if states:
            groups.append(StateGroup(tuple(range(len(states)))))
        regions = [Region(b.page_size_bytes, layers=(i,)) for i, b in enumerate(backends)]
        regions += [Region(state.page_bytes, states=(i,)) for i, state in enumerate(states)]
        return cls(tuple(groups), tuple(regions))


_ROUNDING_SHIFT = 3
"""Rounding adds at most one part in 2^3."""


def rounded_blocks(num_blocks: int) -> int:
    """The next number of blocks that decode graphs are made for: at most an eighth more."""
    step = 1 << max(0, num_blocks.bit_length() - 1 - _ROUNDING_SHIFT)
    return -(-num_blocks // step) * step


def most_rounded(num_tokens: int) -> int:
    """The most tokens that `rounded_blocks` makes of so many."""
    return num_tokens + (num_tokens >> _ROUNDING_SHIFT)
