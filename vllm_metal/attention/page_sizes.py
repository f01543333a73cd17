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
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def page_sizes(
    layers: Sequence[TokenBytes], state_bytes: Sequence[int], block_size: int
) -> list[PageSize]:
    """The block of every attention layer.

    Args:
        layers: the attention layers.
        state_bytes: bytes of each recurrent state; a page holds one.
        block_size: tokens of a block at least.
    """
    windows = {layer.sliding_window for layer in layers}
    if len(windows) < 2 and not state_bytes or not layers:
        return [PageSize(block_size, block_size * layer.bytes_per_token) for layer in layers]
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


def _tokens(page_bytes: int, bytes_per_token: int) -> int:
    return page_bytes // (TOKEN_STEP * bytes_per_token) * TOKEN_STEP
