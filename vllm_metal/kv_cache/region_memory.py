"""The memory of one region: an array with the pages of its blocks one after another."""

import mlx.core as mx
import numpy as np


class RegionMemory:
    """The array of a region, and who wrote to it in the running forward pass.

    Args:
        num_blocks: blocks of the region.
        page_bytes: bytes of a block.
        dtypes: element types of the layers that share it; several are views of halfwords.
    """

    def __init__(self, num_blocks: int, page_bytes: int, dtypes: set[mx.Dtype]):
        [dtype] = dtypes if len(dtypes) == 1 else {mx.uint16}
        self.array = mx.zeros((num_blocks, page_bytes // dtype.size), dtype)
        self.dtype = dtype
        self.page_bytes = page_bytes
        self.writer: int | None = None
        """The layer that wrote last in this forward pass."""

    def view(self, dtype: mx.Dtype) -> mx.array:
        """The same bytes as elements of `dtype`."""
        return self.array if dtype == self.dtype else self.array.view(dtype)

    def replace(self, array: mx.array) -> None:
        """Takes what a write made of `view`."""
        self.array = array if array.dtype == self.dtype else array.view(self.dtype)

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copies whole blocks, in place; the caller evaluates the array."""
        blocks = self.array[mx.array(sources)]
        finish(blocks)  # read before the write, or MLX copies the whole array
        self.array[mx.array(destinations)] = blocks

    def read(self, blocks: list[int]) -> np.ndarray:
        """The bytes of some blocks, [blocks, page bytes] uint8: a copy."""
        rows = self.array[mx.array(blocks)].view(mx.uint8)
        finish(rows)
        return np.array(rows)

    def write(self, blocks: list[int], pages: np.ndarray) -> None:
        """Writes bytes as `read` gives them, in place; the caller evaluates the array."""
        rows = mx.array(np.ascontiguousarray(pages)).view(self.dtype)
        finish(rows)
        self.array[mx.array(blocks)] = rows


def finish(*arrays) -> None:
    """Evaluates, and waits until MLX lets go of what was read.

    On a GPU it may hold buffers a moment longer than it takes for a result to be there, and would
    copy pages that it could write in place.
    """
    mx.eval(*arrays)
    mx.synchronize()
