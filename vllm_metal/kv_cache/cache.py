"""The sole owner of every layer's pages.

Pages are written in place because nobody but this object holds them: `store` hands the arrays to
the backend, drops them, and keeps what comes back. On MLX's CPU stream a write is in place only
when its array has no other holder at the moment it is dispatched, so a forward pass is evaluated
before the next one is dispatched (`ModelRunner`).
"""

from collections.abc import Sequence

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Pages
from vllm_metal.attention.metadata import AttentionMetadata


class KVCache:
    """Pages of all layers.

    Args:
        backends: one for each attention layer, in model order.
        num_blocks: blocks of each layer; block 0 is vLLM's null block.
    """

    def __init__(self, backends: Sequence[AttentionBackend], num_blocks: int):
        self.backends = list(backends)
        self.num_blocks = num_blocks
        self._pages: list[Pages] = [backend.allocate(num_blocks) for backend in self.backends]
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Every page array, for evaluation. Do not keep the list across a step."""
        return [array for pages in self._pages for array in pages]

    @property
    def nbytes(self) -> int:
        """Bytes that the pages really occupy."""
        return sum(array.nbytes for array in self.arrays)

    def pages(self, layer: int) -> Pages:
        """Pages of one layer, for reading within the current forward pass."""
        return self._pages[layer]

    def take(self) -> list[Pages]:
        """Hands all pages over to a caller that will `put` them, or their successors, back."""
        pages, self._pages = self._pages, []
        return pages

    def put(self, pages: list[Pages]) -> None:
        """The reverse of `take`."""
        self._pages = list(pages)

    def store(
        self, layer: int, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> None:
        """Writes keys [T, H, Dk] and values [T, H, Dv] to the slots of `metadata`."""
        self._pages[layer] = self.backends[layer].store(self._pages[layer], keys, values, metadata)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer."""
        source = mx.array([src for src, _ in copies])
        destination = mx.array([dst for _, dst in copies])
        for backend, pages in zip(self.backends, self._pages, strict=True):
            backend.copy_blocks(pages, source, destination)
        mx.eval(self.arrays)
