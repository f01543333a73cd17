"""The backend on the kernels: what the plain path computes, from the same bytes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.attention.paged_layer import PagedLayer, Request
from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.paged import backend as backend_module
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

BLOCK, HEADS, GROUP, SIZE = 16, 2, 3, 64
SHAPE = LayerShape(num_kv_heads=HEADS, head_size=SIZE, head_size_v=SIZE)
FORMATS = parse_pair("uint4/q3_0")
TARGET = HostTarget()
TOLERANCE = 4e-3
EMPTY = mx.zeros((0,), mx.int32)


def constants() -> KeyConstants:
    rng = np.random.default_rng(5)
    centre = rng.standard_normal((HEADS, SIZE)).astype(np.float32)
    return KeyConstants(centre, np.exp(0.1 * rng.standard_normal((HEADS, SIZE))).astype(np.float32))


def on_operations(shape: LayerShape = SHAPE, reproducible: bool = False) -> TurboQuantReference:
    return TurboQuantReference(shape, BLOCK, FORMATS, constants(), reproducible)


def on_kernels(shape: LayerShape = SHAPE, reproducible: bool = False) -> TurboQuantFused:
    return TurboQuantFused(shape, BLOCK, FORMATS, constants(), TARGET, reproducible)


def layer_of(backend: AttentionBackend, *lengths: int, sinks: bool = False) -> tuple:
    """A layer and requests of these lengths: for every backend the same, in the same blocks."""
    layer = PagedLayer(backend)
    requests = [layer.request(length, HEADS * GROUP, sinks) for length in lengths]
    return layer, *(replace(request, sinks=requests[0].sinks) for request in requests)


def prefill(layer: PagedLayer, request: Request, *cuts: int) -> list[np.ndarray]:
    """Outputs of the chunks from one cut to the next."""
    pairs = zip(cuts, cuts[1:], strict=False)
    return [np.array(layer.prefill(request, start, end)) for start, end in pairs]


def close(out: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(out - expected) < TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_chunks_and_decode_match_the_plain_path(reproducible, sinks):
    results = []
    for make in (on_operations, on_kernels):
        layer, long, short = layer_of(make(reproducible=reproducible), 71, 20, sinks=sinks)
        outputs = prefill(layer, long, 0, 21, 22, 70) + prefill(layer, short, 0, 19)
        outputs.append(np.array(layer.decode([long, short])))
        results.append((outputs, np.array(layer.pages.array)))
    (expected, expected_pages), (outputs, stored) = results
    np.testing.assert_array_equal(stored, expected_pages)
    for out, wanted in zip(outputs, expected, strict=True):
        close(out, wanted)


def test_what_is_read_back_matches_the_plain_path():
    """Keys and values as the model had them, of a chunk and of rows of unequal lengths."""
    results = []
    for make in (on_operations, on_kernels):
        layer, long, short = layer_of(make(), 71, 20)
        prefill(layer, long, 0, 70)
        prefill(layer, short, 0, 20)
        asked = layer.chunk(long, 70, 71), layer.rows([long, short], [40, 9])
        results.append([part for told in asked for part in layer.backend.read(layer.pages, told)])
    for part, wanted in zip(*results, strict=True):
        assert part.shape == wanted.shape
        close(np.array(part), np.array(wanted))


def test_a_tile_for_each_head_gives_what_one_tile_gives(monkeypatch):
    for window in (None, 1, 9, 40, 1000):
        shape = replace(SHAPE, sliding_window=window)
        plain, request = layer_of(on_operations(shape), 96)
        *_, expected = prefill(plain, request, 0, 70, 96)
        backend = on_kernels(shape)
        layer, request = layer_of(backend, 96)
        assert len(backend._head_tiles(96, 4)) == 1
        *_, out = prefill(layer, request, 0, 70, 96)
        close(out, expected)
        with monkeypatch.context() as patch:
            patch.setattr(backend_module, "TILE_BYTES", 1)
            assert backend._head_tiles(96, 4) == [slice(0, 1), slice(1, 2)]
            [tiled] = prefill(layer, request, 70, 96)
        np.testing.assert_allclose(tiled, out, atol=1e-5)


def test_a_window_bounds_what_is_dequantised():
    backend = on_kernels(replace(SHAPE, sliding_window=9))
    assert backend._visible(PrefillMetadata(EMPTY, EMPTY, 70, 10)) == (62, 18)
    assert backend._visible(PrefillMetadata(EMPTY, EMPTY, 4, 8)) == (0, 12)


def test_what_is_dequantised_at_a_time_is_bounded_until_one_head_alone_is_more():
    """In the plan, as tokens of all heads in two tiles; 2^17 tokens fill one in 16 bits."""
    backend = on_kernels()
    assert backend.chunk_memory(64, 100, 6).whole_tokens == 2 * 100
    assert backend.chunk_memory(64, 1 << 17, 6).whole_tokens == 2 << 17
    assert backend.chunk_memory(64, 1 << 18, 6).whole_tokens == 2 << 17
    assert backend.chunk_memory(64, 1 << 20, 6).whole_tokens == 2 << 19


def test_rows_are_scored_in_tiles_of_the_heads_that_are_held():
    backend = on_kernels()
    whole = backend.chunk_memory(2048, 1 << 17, 6)
    half = backend.chunk_memory(2048, 1 << 18, 6)
    assert half.scored_rows == whole.scored_rows == 2
    assert half.held * half.score_bytes == whole.held * whole.score_bytes / 2 == 2 * 4 * 3
