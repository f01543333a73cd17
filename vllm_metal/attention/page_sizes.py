"""Pages of one size for layers of different kinds, with little waste.

vLLM gives layers of different kinds (full attention, sliding windows, recurrent state) groups of
their own, and a block of any group the same bytes. Where pages differ, vLLM multiplies block sizes
or pads pages to the largest, which can cost more than compression saves. So each attention layer
gets here as many tokens in a block as the common page holds, and the rest is padding:

    common page  |------------------------------|
    dense        |==== 16 tokens ===============|
    compressed   |== 40 tokens ==============|..|    padding: less than 8 tokens
    state        |== 1 request ============|....|

Layers of one kind keep the block size that the user chose, whatever their pages.

Where the prefixes of a model with recurrent state are cached, a kept state is one after M tokens,
2 M tokens and so on. M has to be the smallest block of all layers: vLLM ends prompt chunks at
multiples of the smallest block, and files the state that it finds there as one after a multiple of
M. So all attention layers get blocks of M tokens, or of a multiple of M, and the page is padded:

    common page  |------------------------------|
    dense        |==== M tokens ================|
    compressed   |== 2 M tokens ===========|....|
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

TOKEN_STEP = 8
"""Block sizes are multiples of this: kernels read runs of 8 tokens."""


@dataclass(frozen=True)
class PageSize:
    """The block of one attention layer."""

    block_size: int
    """Tokens."""
    page_bytes: int
    """Bytes from one block to the next."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that an attention layer needs for one token."""

    bytes_per_token: int
    sliding_window: int | None = None


_MATCH_UNITS = (64, 32, 16, TOKEN_STEP)
"""Tokens from one place inside of a block where a prefix may be found to the next: the largest of
these that is an eighth of a block or less."""


@dataclass(frozen=True)
class StateCaching:
    """What the prefix cache asks of the blocks of a model with recurrent state."""

    chunk_tokens: int
    """Tokens of the longest prompt chunk."""
    step_tokens: int
    """Tokens of all requests in a step."""
    max_requests: int
    """Requests in a step."""
    match_unit: int | None = None
    """`--prefix-match-unit`: blocks are multiples of it. None: chosen by their size."""

    def starves(self, block_size: int) -> bool:
        """Whether requests that decode can keep a new prompt from starting.

        vLLM ends a chunk at a multiple of the block, if a chunk can have a block's tokens. While
        other requests decode, a step has fewer tokens left, and the chunk would have none at all.
        """
        return self.step_tokens - self.max_requests < block_size <= self.chunk_tokens

    def block_size(self, at_least: int, unit: int) -> int:
        """The smallest block that starves nobody; a multiple of `unit`."""
        block_size = -(-at_least // unit) * unit
        if self.starves(block_size):
            block_size = (self.chunk_tokens // unit + 1) * unit
        return block_size


def match_unit(block_size: int) -> int | None:
    """Tokens between the places inside of a block of `block_size` tokens where prefixes are found.

    None where blocks are so small that prefixes may as well be found at their ends alone.
    """
    unit = match_unit_at_most(block_size)
    return unit and min(unit, block_size & -block_size)


def match_unit_at_most(block_size: int) -> int | None:
    """`match_unit` of a block that is rounded up to a multiple of it."""
    return next((unit for unit in _MATCH_UNITS if 8 * unit <= block_size), None)


def page_sizes(
    layers: Sequence[TokenBytes],
    state_bytes: Sequence[int],
    block_size: int,
    caching: StateCaching | None = None,
) -> list[PageSize]:
    """The block of every attention layer.

    Args:
        layers: the attention layers.
        state_bytes: bytes of each recurrent state; a page holds one.
        block_size: tokens of a block at least.
        caching: how prefixes are cached; None where they are not, or need nothing of the blocks
            because there are no states.
    """
    windows = {layer.sliding_window for layer in layers}
    if len(windows) < 2 and not state_bytes or not layers:
        return [PageSize(block_size, block_size * layer.bytes_per_token) for layer in layers]
    if caching is not None and state_bytes:
        return _pages_beside_kept_states(layers, state_bytes, block_size, caching)
    page_bytes = _common_page(layers, state_bytes, block_size)
    return [PageSize(_tokens(page_bytes, layer.bytes_per_token), page_bytes) for layer in layers]


def _common_page(layers: Sequence[TokenBytes], state_bytes: Sequence[int], block_size: int) -> int:
    """The page that wastes the smallest part of itself, summed over all layers."""
    each = {layer.bytes_per_token for layer in layers}
    least = max([*state_bytes, *(block_size * size for size in each)])
    candidates = {
        -(-least // (TOKEN_STEP * size)) * TOKEN_STEP * size + more * TOKEN_STEP * size
        for size in each
        for more in range(max(1, block_size // TOKEN_STEP))
    }

    def waste(page_bytes: int) -> float:
        sizes = [layer.bytes_per_token for layer in layers]
        used = sum(state_bytes) + sum(_tokens(page_bytes, size) * size for size in sizes)
        return len(layers) + len(state_bytes) - used / page_bytes

    return min(sorted(candidates), key=waste)


def _pages_beside_kept_states(
    layers: Sequence[TokenBytes],
    state_bytes: Sequence[int],
    block_size: int,
    caching: StateCaching,
) -> list[PageSize]:
    """Blocks of M tokens, or of multiples of M where prefixes are found inside of blocks.

    The largest layer has M tokens in a block, and its padding is what makes room for a whole
    multiple of M in smaller layers. The page that wastes the smallest part of itself is taken.
    """
    sizes = [layer.bytes_per_token for layer in layers]
    each, largest = set(sizes), max(sizes)
    finds_inside = has_no_window(layers)
    if finds_inside and len(each) > 1:
        block_size = max(block_size, 8 * TOKEN_STEP)  # so that there is a unit within a block

    def pages(bytes_per_token: int) -> list[PageSize]:
        """With so many bytes of a page for each of the M tokens."""
        at_least = max(block_size, -(-max(state_bytes) // bytes_per_token))
        unit = caching.match_unit or (match_unit_at_most(at_least) if finds_inside else None)
        smallest = caching.block_size(at_least, lcm(TOKEN_STEP, unit or TOKEN_STEP))
        page_bytes = smallest * bytes_per_token
        multiples = [bytes_per_token // size if finds_inside else 1 for size in sizes]
        return [PageSize(smallest * multiple, page_bytes) for multiple in multiples]

    def waste(pages: Sequence[PageSize]) -> float:
        page_bytes = pages[0].page_bytes
        tokens = [page.block_size for page in pages]
        used = sum(state_bytes) + sum(n * size for n, size in zip(tokens, sizes, strict=True))
        return len(layers) + len(state_bytes) - used / page_bytes

    per_token = {largest}
    if finds_inside:
        per_token |= {
            size * k for size in each for k in range(largest // size + 1, 2 * largest // size)
        }
    return min(map(pages, sorted(per_token)), key=waste)


def has_no_window(layers: Sequence[TokenBytes]) -> bool:
    """Whether all layers attend over the whole request: only there can vLLM find a prefix that
    ends inside of a block."""
    return all(layer.sliding_window is None for layer in layers)


def _tokens(page_bytes: int, bytes_per_token: int) -> int:
    return page_bytes // (TOKEN_STEP * bytes_per_token) * TOKEN_STEP
