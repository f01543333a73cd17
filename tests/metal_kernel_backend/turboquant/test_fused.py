"""The backend on the kernels: what the reference path computes, from the same bytes."""

import mlx.core as mx
import numpy as np
import pytest

from tests.pages import empty_pages
from vllm_metal.attention.backend import Chunk, LayerShape, Rows
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.turboquant import fused
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

BLOCK, HEADS, GROUP, SIZE = 16, 2, 3, 64
SHAPE = LayerShape(num_kv_heads=HEADS, head_size=SIZE, head_size_v=SIZE)
FORMATS = parse_pair("uint4/q3_0")
TARGET = HostTarget()
TOLERANCE = 4e-3


def constants() -> KeyConstants:
    rng = np.random.default_rng(5)
    centre = rng.standard_normal((HEADS, SIZE)).astype(np.float32)
    return KeyConstants(centre, np.exp(0.1 * rng.standard_normal((HEADS, SIZE))).astype(np.float32))


def pair(reproducible: bool = False):
    reference = TurboQuantReference(SHAPE, BLOCK, FORMATS, constants(), reproducible)
    return reference, TurboQuantFused(SHAPE, BLOCK, FORMATS, constants(), TARGET, reproducible)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def prefill_metadata(start: int, end: int) -> PrefillMetadata:
    table = mx.array([[3, 1, 4, 2, 6, 5]])
    positions = mx.arange(start, end)
    slots = table[0][positions // BLOCK] * BLOCK + positions % BLOCK
    return PrefillMetadata(table, slots.astype(mx.int32), start, end - start)


def prefill(backend, pages, start: int, end: int, sinks):
    """One chunk of a prompt: stores it, and attends."""
    metadata = prefill_metadata(start, end)
    keys, values = normal(1, 96, HEADS, SIZE)[start:end], normal(2, 96, HEADS, SIZE)[start:end]
    pages = backend.store(pages, keys, values, metadata)
    queries = normal(3, HEADS * GROUP, 96, SIZE)[:, start:end]
    heads_first = keys.swapaxes(0, 1), values.swapaxes(0, 1)
    out = backend.prefill(pages, Chunk(queries, *heads_first, metadata, SIZE**-0.5, sinks))
    mx.eval(pages, out)
    return pages, np.array(out)


def close(out: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(out - expected) < TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("sinks", [None, mx.linspace(-1, 2, HEADS * GROUP)], ids=["", "sinks"])
def test_chunks_and_decode_match_the_reference_path(reproducible, sinks):
    results = []
    for backend in pair(reproducible):
        pages, outputs = empty_pages(backend, 7), []
        for start, end in ((0, 21), (21, 22), (22, 70)):
            pages, out = prefill(backend, pages, start, end, sinks)
            outputs.append(out)
        metadata = DecodeMetadata(
            mx.array([[3, 1, 4, 2, 6], [3, 1, 0, 0, 0]]),
            mx.array([71, 20]),
            mx.array([6 * BLOCK + 6, 1 * BLOCK + 3]),
            mx.array([70, 19]),
            71,
        )
        pages = backend.store(pages, normal(7, 2, HEADS, SIZE), normal(8, 2, HEADS, SIZE), metadata)
        rows = Rows(normal(9, 2, HEADS * GROUP, SIZE), metadata, 0.125, sinks)
        out = backend.decode(pages, rows)
        outputs.append(np.array(out))
        results.append((outputs, np.array(pages.array)))
    (expected, expected_pages), (outputs, stored) = results
    np.testing.assert_array_equal(stored, expected_pages)
    for out, wanted in zip(outputs, expected, strict=True):
        close(out, wanted)


def test_what_is_read_back_matches_the_reference_path():
    """Keys and values as the model had them, of a chunk and of rows in blocks of any order."""
    rows = DecodeMetadata(
        mx.array([[3, 1, 4], [2, 0, 0]]), mx.array([40, 9]), mx.array([0, 0]), mx.array([39, 8]), 40
    )
    results = []
    for backend in pair():
        pages, _ = prefill(backend, empty_pages(backend, 7), 0, 70, None)
        results.append([*backend.read(pages, prefill_metadata(70, 71)), *backend.read(pages, rows)])
    for part, wanted in zip(*results, strict=True):
        assert part.shape == wanted.shape
        close(np.array(part), np.array(wanted))


@pytest.mark.parametrize("window", [None, 1, 9, 40, 1000])
def test_a_tile_for_each_head_gives_what_one_tile_gives(monkeypatch, window):
    shape = LayerShape(HEADS, SIZE, SIZE, sliding_window=window)
    reference = TurboQuantReference(shape, BLOCK, FORMATS, constants())
    pages, _ = prefill(reference, empty_pages(reference, 7), 0, 70, None)
    _, expected = prefill(reference, pages, 70, 96, None)
    backend = TurboQuantFused(shape, BLOCK, FORMATS, constants(), TARGET)
    pages, _ = prefill(backend, empty_pages(backend, 7), 0, 70, None)
    assert len(backend._head_tiles(96, 4)) == 1
    _, out = prefill(backend, pages, 70, 96, None)
    close(out, expected)
    monkeypatch.setattr(fused, "TILE_BYTES", 1)
    assert backend._head_tiles(96, 4) == [slice(0, 1), slice(1, 2)]
    _, tiled = prefill(backend, pages, 70, 96, None)
    np.testing.assert_allclose(tiled, out, atol=1e-5)


def test_a_window_bounds_what_is_dequantised():
    shape = LayerShape(HEADS, SIZE, SIZE, sliding_window=9)
    backend = TurboQuantFused(shape, BLOCK, FORMATS, constants(), TARGET)
    assert backend._visible(prefill_metadata(70, 80)) == (62, 18)
    assert backend._visible(prefill_metadata(4, 12)) == (0, 12)


def test_what_is_dequantised_at_a_time_is_bounded_until_one_head_alone_is_more():
    """In the plan, as tokens of all heads; 2^18 tokens of both heads fill a tile in 16 bits."""
    _, backend = pair()
    assert backend.chunk_memory(64, 100, 6).whole_tokens == 100
    assert backend.chunk_memory(64, 1 << 18, 6).whole_tokens == 1 << 18
    assert backend.chunk_memory(64, 1 << 19, 6).whole_tokens == 1 << 18
    assert backend.chunk_memory(64, 1 << 21, 6).whole_tokens == 1 << 20


def test_rows_are_scored_in_tiles_of_the_heads_that_are_held():
    _, backend = pair()
    whole = backend.chunk_memory(2048, 1 << 18, 6)
    half = backend.chunk_memory(2048, 1 << 19, 6)
    assert half.scored_rows == whole.scored_rows == 1
    assert half.held * half.score_bytes == whole.held * whole.score_bytes / 2 == 4 * 3
