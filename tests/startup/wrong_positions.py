"""Rotary embeddings that misread an array of positions."""

import mlx.core as mx
import mlx.nn as nn


class FirstPosition(nn.Module):
    """A rotary embedding that rotates every row as if it stood where the first one does."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return self.rope(x, offset=offset if isinstance(offset, int) else offset[0])


class NoPosition(FirstPosition):
    """One that takes an array of positions for the beginning."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return self.rope(x, offset=offset if isinstance(offset, int) else 0)
