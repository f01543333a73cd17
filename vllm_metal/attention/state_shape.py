"""The recurrent state of one layer: a few arrays for each request, of a size that never grows."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx


@dataclass(frozen=True)
class StateShape:
    """The arrays of one layer's state, as a dry forward finds them.

    None stands for an array that the model never sets.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    """Shapes without the axis of requests."""
    dtypes: tuple[mx.Dtype | None, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one request's state."""
        return sum(
            prod(shape) * dtype.size
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            if shape is not None and dtype is not None
        )

    @property
    def page_bytes(self) -> int:
        """`num_bytes`, up to the next even number."""
        return self.num_bytes + self.num_bytes % 2
