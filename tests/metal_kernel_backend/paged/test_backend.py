"""What backends on the kernels share: order by tokens, and tiles of heads that a chunk reads."""

import mlx.core as mx
import numpy as np
import pytest

from tests.attention.paged_layer import PagedLayer, error, fill
from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.paged import backend as module
from vllm_metal.metal_kernel_backend.paged.tiles_in_flight import MOST_TILES

SHAPE = LayerShape(2, 64, 64)


def prefilled(target, tokens: int = 70) -> tuple[PagedLayer, object]:
    layer = PagedLayer(DenseFused(SHAPE, 16, mx.float32, target))
    request = layer.request(tokens, 6)
    layer.prefill(request, 0, tokens - 20)
    return layer, request


@needs_lazy_target
def test_readers_run_after_the_store_whose_token_they_bind(monkeypatch):
    """In one evaluation; without the token, a reader of the same pages sees what was before."""
    layer, request = prefilled(LazyTarget())
    request.queries, request.keys = request.queries[:, :51], request.keys[:, :51]
    request.values = request.values[:, :51]
    expected = layer.expected_decode([request])
    right = error(layer.decode([request]), expected, request)
    assert right < 1e-5
    early = layer.backend.first_token()
    layer, request = prefilled(LazyTarget())
    request.queries, request.keys = request.queries[:, :51], request.keys[:, :51]
    request.values = request.values[:, :51]
    decode = DenseFused.decode

    def unordered(self, pages, rows):
        return decode(self, pages._replace(token=early), rows)

    monkeypatch.setattr(DenseFused, "decode", unordered)
    assert error(layer.decode([request]), expected, request) > 1e-3


@pytest.mark.parametrize("window", [None, 9])
def test_a_tile_for_each_head_gives_what_one_tile_gives(monkeypatch, window):
    shape = LayerShape(2, 64, 64, sliding_window=window)
    outputs = []
    for tile_bytes in (module.TILE_BYTES, 1):
        monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
        layer = PagedLayer(DenseFused(shape, 16, mx.float32, HostTarget()))
        assert len(layer.backend._head_tiles(70, 4)) == (2 if tile_bytes == 1 else 1)
        request = layer.request(70, 6)
        layer.prefill(request, 0, 50)
        outputs.append(layer.prefill(request, 50, 70))
        assert error(outputs[-1], request.expected(50, 70), request) < 1e-5
    np.testing.assert_allclose(*map(np.array, outputs), atol=1e-6)


def test_a_chunk_is_planned_with_the_heads_that_a_tile_holds():
    backend = DenseFused(SHAPE, 16, mx.float16, HostTarget())
    assert backend.chunk_memory(64, 1 << 17, 6).whole_tokens == MOST_TILES << 17
    assert backend.chunk_memory(64, 1 << 18, 6).whole_tokens == MOST_TILES << 17


def test_a_chunk_without_context_reads_no_pages(monkeypatch):
    monkeypatch.setattr(DenseFused, "prefill_with_context", None)
    layer = PagedLayer(DenseFused(SHAPE, 16, mx.bfloat16, HostTarget()))
    request = layer.request(30, 6)
    out = layer.prefill(request, 0, 30)
    assert error(out, request.expected(0, 30), request) < 1e-5
    fill(layer, layer.request(1, 6))
