"""The recurrent state of one layer: a few arrays for each request, of a size that never grows."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx


@dataclass(frozen=True)
class StateShape:
    """The arrays of one layer's state, read off a dry forward; None: never set by the model."""

    shapes: tuple[tuple[int, ...] | None, ...]
    """Without the axis of requests."""
    dtypes: tuple[mx.Dtype | None, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one request's state."""
        arrays = zip(self.shapes, self.dtypes, strict=True)
        return sum(prod(shape) * dtype.size for shape, dtype in arrays if shape is not None)

    @property
    def page_bytes(self) -> int:
        """`num_bytes`, up to the next even number."""
        return self.num_bytes + self.num_bytes % 2
