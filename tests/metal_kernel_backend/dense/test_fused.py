"""Dense pages on the kernels: the bytes of the operations, and nothing of what lies beside them."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs
from tests.attention.paged_layer import PagedLayer, error, fill
from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.attention.backend import LayerShape, Pages, Rows
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused, obstacle
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.host_target import HostTarget

BLOCK = 8
TARGET = HostTarget()
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [LayerShape(2, 64, 64), LayerShape(3, 36, 20), LayerShape(1, 5, 7)]


@pytest.mark.parametrize("given", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 48])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_the_operations(dtype, shape, padding, given):
    """But for the bits of a NaN, which each target has its own of. Also of keys and values that are
    not finite, or not in the pages' type; and what is not written stays."""
    rng = np.random.default_rng(3)
    heads, tokens = shape.num_kv_heads, 19
    keys, values = (
        rng.standard_normal((tokens, heads, size)).astype(np.float32) * 10.0 ** rng.integers(-6, 7)
        for size in (shape.head_size, shape.head_size_v)
    )
    keys[2, 0, 1], keys[4, -1, 0], values[7, 0, 2] = np.nan, np.inf, -np.inf
    keys[9, 0, 0], values[11, -1, 1] = 1e6, 7e4  # over what float16 holds
    page = BLOCK * heads * (shape.head_size + shape.head_size_v) * dtype.size + padding
    slots = 1 * BLOCK + rng.permutation(3 * BLOCK)[:tokens]
    metadata = PrefillMetadata(mx.array([[1, 2, 3]]), mx.array(slots.astype(np.int32)), 0, tokens)
    stored = []
    for backend in (
        DensePages(shape, BLOCK, dtype, page),
        DenseFused(shape, BLOCK, dtype, TARGET, page),
    ):
        array = mx.full((5, page), 0x5A, mx.uint8).view(dtype)
        mx.eval(array)
        pages = Pages(array, backend.first_token())
        pages = backend.store(pages, *(mx.array(x).astype(given) for x in (keys, values)), metadata)
        array = mx.where(mx.isnan(pages.array), mx.array(mx.nan, dtype), pages.array)
        stored.append(np.array(array.view(mx.uint8)))
    np.testing.assert_array_equal(*stored)


@pytest.mark.parametrize("window", [None, 1, 9, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_others_left_in_the_pages_reaches_no_output(shape, window):
    """Pages of NaN: behind the end, before the window, in other blocks and in their padding."""
    backend = DenseFused(replace(shape, sliding_window=window), BLOCK, mx.float16, TARGET)
    layer = PagedLayer(backend)
    [region] = layer.kv_cache._regions
    region.array = mx.full(region.array.shape, mx.nan, region.array.dtype)
    mx.eval(region.array)
    requests = [layer.request(n, 3 * shape.num_kv_heads) for n in inputs.lengths(BLOCK)]
    for request in requests:
        fill(layer, request)
    for request in requests:  # the window has left these blocks: another layer may have them
        gone = (request.seq_len - window) // BLOCK if window else 0
        region.array[mx.array(request.block_ids[: max(0, gone)], mx.int32)] = mx.nan
    mx.eval(region.array)
    out = layer.decode(requests)
    assert error(out, layer.expected_decode(requests), *requests) < 1e-3


def test_a_store_writes_in_place_and_gives_a_token():
    backend = DenseFused(SHAPES[0], BLOCK, mx.float32, TARGET)
    layer = PagedLayer(backend)
    assert not layer.kv_cache.shares_arrays and backend.stores_through
    before = np.array(layer.pages.array, copy=False).ctypes.data
    fill(layer, layer.request(20, 2))
    assert layer.pages.token is not None
    assert np.array(layer.pages.array, copy=False).ctypes.data == before


@needs_lazy_target
def test_a_decode_step_gathers_nothing():
    """Its peak is a small part of the context, which the operations copy; pages are as planned."""
    shape, tokens, peaks = LayerShape(1, 64, 64), 4096, []
    context = tokens * 2 * 64 * 4
    for backend in (
        DensePages(shape, BLOCK, mx.float32),
        DenseFused(shape, BLOCK, mx.float32, LazyTarget()),
    ):
        layer = PagedLayer(backend, num_blocks=tokens // BLOCK + 1)
        assert layer.kv_cache.nbytes == (tokens // BLOCK + 1) * backend.page_size_bytes
        rows = layer.rows([layer.request(tokens, 2)], [tokens])
        queries = mx.ones((1, 2, 64))
        mx.eval(queries)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(backend.decode(layer.pages, Rows(queries, rows, 1.0)))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > context > 8 * peaks[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_back_is_what_the_operations_gather(dtype):
    read = []
    for backend in (
        DensePages(SHAPES[1], BLOCK, dtype),
        DenseFused(SHAPES[1], BLOCK, dtype, TARGET),
    ):
        layer = PagedLayer(backend)
        long, short = layer.request(37, 3), layer.request(9, 3)
        fill(layer, long)
        fill(layer, short)
        for told in (layer.chunk(long, 30, 36), layer.rows([long, short], [36, 8])):
            read += [np.array(x.astype(mx.float32)) for x in backend.read(layer.pages, told)]
    for ours, theirs in zip(read[4:], read[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "block_size", "reason"),
    [
        (LayerShape(1, 512, 512), 8, ""),
        (LayerShape(1, 576, 64, fetched=True), 8, ""),
        (LayerShape(1, 520, 64), 8, "its head sizes 520 and 64 are over 512"),
        (LayerShape(1, 64, 64), 4, "its blocks of 4 tokens are not a multiple of 8"),
        (LayerShape(1, 64, 0, fetched=True), 8, "it caches one array instead of keys and values"),
    ],
)
def test_what_the_kernels_cannot_serve_has_a_reason(shape, block_size, reason):
    assert obstacle(shape, block_size) == reason
