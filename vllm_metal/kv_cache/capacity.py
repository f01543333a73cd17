"""How many tokens and requests a number of bytes holds: arithmetic on page sizes only.

The start-up report, the check for too little memory and `vllm-metal plan` ask here.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import AttentionGroup, KVGroup, StateGroup


@dataclass(frozen=True)
class Capacity:
    """Blocks that fit in `page_bytes`.

    Block 0 is vLLM's null block: it takes its bytes and holds no token.
    """

    page_bytes: int
    bytes_per_block: int
    block_size: int
    """Tokens of a block, where there is one group of full attention."""
    groups: tuple[KVGroup, ...] = ()
    """Groups that draw blocks of their own from the pool; by default one of full attention."""
    step_tokens: int = 0
    """Tokens that a request may hold in addition to a window while a step runs."""
    max_model_len: int = 0
    """Tokens of the longest request: what a request may have where all layers are recurrent."""
    match_tokens: int | None = None
    """Prefixes of a model with recurrent state are found at multiples of so many tokens; None where
    there is no such state, or no prefix caching."""

    @classmethod
    def of_one_group(cls, backends: Sequence[AttentionBackend], page_bytes: int) -> "Capacity":
        """Where all layers are of one group (`has_one_group`): a block is a page in each."""
        bytes_per_block = sum(backend.page_size_bytes for backend in backends)
        return cls(page_bytes, bytes_per_block, backends[0].block_size)

    @property
    def num_blocks(self) -> int:
        return max(0, self.page_bytes // self.bytes_per_block)

    @property
    def spare_blocks(self) -> int:
        """Blocks that have to be free for copies (`StateGroup.spare_blocks`)."""
        return sum(group.spare_blocks for group in self._state_groups)

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold: without the null block and those for copies."""
        return max(0, self.num_blocks - 1 - self.spare_blocks)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks of the smallest pool in which a request of `num_tokens` tokens runs."""
        return 1 + self.spare_blocks + self.blocks_for(num_tokens)

    def without_kept_states(self) -> "Capacity":
        """The same bytes, where no prefixes are cached."""
        groups = tuple(
            replace(group, blocks_held=1, spare_blocks=0)
            if isinstance(group, StateGroup)
            else group
            for group in self.groups
        )
        return replace(self, groups=groups, match_tokens=None)

    @property
    def tokens(self) -> int:
        """Length of the one request that fills all blocks."""
        usable = self.usable_blocks
        if not self.groups:
            return usable * self.block_size
        sizes = [group.block_size for group in self.groups if isinstance(group, AttentionGroup)]
        if not sizes:
            return usable // self.blocks_for(1) * self.max_model_len
        lengths = range(usable * max(sizes) + 1)
        return max(0, bisect_right(lengths, usable, key=self.blocks_for) - 1)

    @property
    def pooled_tokens(self) -> int:
        """Tokens of all requests together in one layer: more fit in no layer."""
        sizes = [group.block_size for group in self.groups if isinstance(group, AttentionGroup)]
        return self.num_blocks * max(sizes, default=self.block_size)

    def requests(self, max_model_len: int) -> float:
        """How many requests of `max_model_len` tokens fit."""
        return self.usable_blocks / self.blocks_for(max_model_len)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of one request of `num_tokens` tokens, over all groups."""
        groups = self.groups or (AttentionGroup(self.block_size),)
        return sum(self._blocks_of(group, num_tokens) for group in groups)

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes of one request of `num_tokens` tokens."""
        return self.blocks_for(num_tokens) * self.bytes_per_block

    @property
    def kept_state_bytes(self) -> int:
        """Bytes that the states after one prefix take in the prefix cache: a block of each group
        of states. The keys and values of the prefix come in addition."""
        return len(self._state_groups) * self.bytes_per_block

    def kept_states(self, max_model_len: int) -> int:
        """Prefixes whose states fit beside one request of `max_model_len` tokens."""
        free = self.num_blocks - 1 - self.blocks_for(max_model_len)
        return max(0, free) // len(self._state_groups)

    @property
    def _state_groups(self) -> list[StateGroup]:
        return [group for group in self.groups if isinstance(group, StateGroup)]

    def ratio(self, dense: "Capacity", max_model_len: int) -> float:
        """How many times more requests of `max_model_len` tokens fit than in `dense` pages.

        Over the whole cache, recurrent states and windows included.
        """
        return dense.bytes_for(max_model_len) / self.bytes_for(max_model_len)

    def _blocks_of(self, group: KVGroup, num_tokens: int) -> int:
        if isinstance(group, StateGroup):
            return group.blocks_held
        if group.sliding_window is None:
            return -(-num_tokens // group.block_size)
        held = min(group.sliding_window - 1 + self.step_tokens, num_tokens)
        return -(-held // group.block_size) + 1  # a window may begin inside a block


def has_one_group(layers: Sequence[LayerShape], states: Sequence[StateShape]) -> bool:
    """Whether all layers attend over a whole request: vLLM then puts them into one group."""
    return bool(layers) and not states and all(shape.sliding_window is None for shape in layers)


DENSE_BITS = 16
"""Bits of a dense element that ratios compare with, whatever the model's type."""


@dataclass(frozen=True)
class CacheSummary:
    """The attention layers' part of a cache, summed up for reports."""

    num_layers: int
    num_compressed: int
    bytes_per_token: float
    dense_bytes_per_token: float
    """Bytes of a token in the same layers if they were dense in 16 bits, without unused bytes."""
    num_elements: int
    """Key and value coordinates of one token, all layers."""

    @classmethod
    def of(cls, backends: Sequence[AttentionBackend]) -> "CacheSummary":
        """Sums over the layers."""
        elements = sum(elements_per_token(backend.shape) for backend in backends)
        return cls(
            num_layers=len(backends),
            num_compressed=sum(backend.compressed for backend in backends),
            bytes_per_token=sum(b.page_size_bytes / b.block_size for b in backends),
            dense_bytes_per_token=elements * DENSE_BITS / 8,
            num_elements=elements,
        )

    @property
    def bits_per_element(self) -> float:
        """Stored bits of a key or value coordinate, metadata and dense layers included."""
        return 8 * self.bytes_per_token / (self.num_elements or 1)


def elements_per_token(shape: LayerShape) -> int:
    """Key and value coordinates of one token in one layer."""
    return shape.num_kv_heads * (shape.head_size + shape.head_size_v)
