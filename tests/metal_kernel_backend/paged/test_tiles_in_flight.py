"""A tile is begun before the one before it is waited for, and two exist at a time."""

import mlx.core as mx

from vllm_metal.metal_kernel_backend.paged.tiles_in_flight import TilesInFlight


def test_one_tile_runs_while_the_next_one_is_made(monkeypatch):
    calls = []
    monkeypatch.setattr(mx, "async_eval", lambda tile: calls.append(f"begin {tile}"))
    monkeypatch.setattr(mx, "eval", lambda tile: calls.append(f"wait for {tile}"))
    tiles = TilesInFlight()
    for tile in "abc":
        calls.append(f"make {tile}")
        tiles.add(tile)
    assert calls == [
        *("make a", "begin a"),
        *("make b", "begin b", "wait for a"),
        *("make c", "begin c", "wait for b"),
    ]


def test_tiles_are_computed():
    tiles, arrays = TilesInFlight(), [mx.full((4,), value) + 1 for value in range(3)]
    for array in arrays:
        tiles.add(array)
    assert [array.tolist() for array in arrays] == [[1] * 4, [2] * 4, [3] * 4]
