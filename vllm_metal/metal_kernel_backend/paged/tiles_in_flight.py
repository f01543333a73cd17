"""Tiles of a prefill chunk's attention: one runs while Python and MLX make the next one.

MLX allocates the memory of an operation when it encodes it, and it encodes far ahead of the GPU:
left alone, it would hold the plain keys and values of many tiles at a time. If each tile were
waited for before the next one is made, the GPU would stand still meanwhile, in every layer of every
chunk.
"""

from collections import deque

import mlx.core as mx

MOST_TILES = 2
"""One that runs, and the one that is made or waits behind it."""


class TilesInFlight:
    """The tiles of one forward pass, of all its layers."""

    def __init__(self) -> None:
        self._tiles: deque[mx.array] = deque()

    def add(self, tile: mx.array) -> None:
        """Begins to compute a tile; returns when those before it are computed."""
        mx.async_eval(tile)
        self._tiles.append(tile)
        while len(self._tiles) >= MOST_TILES:
            mx.eval(self._tiles.popleft())
