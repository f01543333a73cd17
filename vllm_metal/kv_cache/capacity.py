"""How many tokens and requests a number of bytes holds: arithmetic on page sizes only.

The start-up report, the check for too little memory and `vllm-metal plan` ask here.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_metal.attention.backend import AttentionBackend, LayerShape
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

    @property
    def num_blocks(self) -> int:
        return max(0, self.page_bytes // self.bytes_per_block)

    @property
    def tokens(self) -> int:
        """Length of the one request that fills all blocks."""
        usable = max(0, self.num_blocks - 1)
        if not self.groups:
            return usable * self.block_size
        lengths = range(usable * max(map(_most_tokens, self.groups)) + 1)
        return max(0, bisect_right(lengths, usable, key=self.blocks_for) - 1)

    @property
    def pooled_tokens(self) -> int:
        """Tokens of all requests together in one layer: more fit in no layer."""
        sizes = [group.block_size for group in self.groups if isinstance(group, AttentionGroup)]
        return self.num_blocks * max(sizes, default=self.block_size)

    def requests(self, max_model_len: int) -> float:
        """How many requests of `max_model_len` tokens fit."""
        return max(0, self.num_blocks - 1) / self.blocks_for(max_model_len)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of one request of `num_tokens` tokens, over all groups."""
        groups = self.groups or (AttentionGroup(self.block_size),)
        return sum(self._blocks_of(group, num_tokens) for group in groups)

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes of one request of `num_tokens` tokens."""
        return self.blocks_for(num_tokens) * self.bytes_per_block

    def ratio(self, dense: "Capacity", max_model_len: int) -> float:
        """How many times more requests of `max_model_len` tokens fit than in `dense` pages.

        Over the whole cache, recurrent states and windows included.
        """
        return dense.bytes_for(max_model_len) / self.bytes_for(max_model_len)

    def _blocks_of(self, group: KVGroup, num_tokens: int) -> int:
        if isinstance(group, StateGroup):
            return 1
        if group.sliding_window is None:
            return -(-num_tokens // group.block_size)
        held = min(group.sliding_window - 1 + self.step_tokens, num_tokens)
        return -(-held // group.block_size) + 1  # a window may begin inside a block


def _most_tokens(group: KVGroup) -> int:
    """Tokens of a request that one block covers at most."""
    return group.block_size if isinstance(group, AttentionGroup) else group.max_tokens or 0


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
