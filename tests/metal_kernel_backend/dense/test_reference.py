"""Dense pages on operations: where each element lies. Contract: `attention/test_backend.py`."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.pages import empty_pages
from vllm_metal.attention.backend import Chunk, LayerShape, Rows
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense.reference import DensePages

SHAPE = LayerShape(num_kv_heads=2, head_size=8, head_size_v=4)
BLOCK = 4


@pytest.mark.parametrize("padding", [0, 4, 64])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_token_lies_in_its_block_head_and_row(dtype, padding):
    """Keys `[H, block_size, Dk]`, then values, then padding; and nothing else is written."""
    page_bytes = BLOCK * 2 * 12 * dtype.size + padding
    backend = DensePages(SHAPE, BLOCK, dtype, page_bytes)
    keys = mx.random.normal((3, 2, 8))
    values = mx.random.normal((3, 2, 4))
    slots = [2 * BLOCK + 3, 5 * BLOCK, 5 * BLOCK + 1]
    metadata = PrefillMetadata(mx.array([[2, 5]]), mx.array(slots), context_len=3, query_len=3)
    pages = backend.store(empty_pages(backend, 6), keys, values, metadata)
    expected = np.zeros((6, page_bytes // dtype.size), np.float32)
    for begin, new in ((0, keys), (2 * BLOCK * 8, values)):
        part = np.zeros((6, 2, BLOCK, new.shape[-1]), np.float32)
        for token, slot in enumerate(slots):
            part[slot // BLOCK, :, slot % BLOCK] = np.array(
                new[token].astype(dtype).astype(mx.float32)
            )
        part = part.reshape(6, -1)
        expected[:, begin : begin + part.shape[1]] = part
    np.testing.assert_array_equal(np.array(pages.array.astype(mx.float32)), expected)


def test_a_prefill_without_context_reads_no_pages():
    """The chunk's own keys and values enter as they are, whatever the precision of the pages."""
    keys, values, queries = (mx.random.normal((2, 6, size)) for size in (8, 4, 8))
    metadata = PrefillMetadata(mx.array([[1, 2]]), mx.arange(6) + BLOCK, 0, 6)
    outs = []
    for dtype in (mx.float32, mx.bfloat16):
        backend = DensePages(SHAPE, BLOCK, dtype)
        pages = empty_pages(backend, 3)
        outs.append(backend.prefill(pages, Chunk(queries, keys, values, metadata, 1.0)))
    assert mx.array_equal(*outs)
    expected = reference.attention(*(np.array(a) for a in (queries, keys, values)), 1.0)
    np.testing.assert_allclose(np.array(outs[0]), expected, atol=2e-6)


def test_layers_share_index_arrays():
    """A second layer of the same shape derives nothing anew."""
    backends = [DensePages(SHAPE, BLOCK, mx.float32) for _ in range(2)]
    metadata = DecodeMetadata(mx.array([[1]]), mx.array([1]), mx.array([BLOCK]), 0, 1)
    query, pages = mx.zeros((1, 2, 8)), [empty_pages(backend, 2) for backend in backends]
    derived = []
    for backend, page in zip(backends, pages, strict=True):
        page = backend.store(page, mx.ones((1, 2, 8)), mx.ones((1, 2, 4)), metadata)
        backend.decode(page, Rows(query, metadata, 1.0))
        derived.append(dict(metadata._derived))
    assert derived[0] and derived[0].keys() == derived[1].keys()
    assert all(derived[1][key] is array for key, array in derived[0].items())


def test_a_layer_that_caches_one_array_takes_no_bytes_for_the_other():
    backend = DensePages(LayerShape(1, 8, 0, fetched=True), BLOCK, mx.float32)
    assert backend.page_size_bytes == BLOCK * 8 * 4
    assert KVCache([backend], 3).nbytes == 3 * backend.page_size_bytes
    pages = empty_pages(backend, 3)
    metadata = PrefillMetadata(mx.array([[2, 1]]), mx.array([8, 9, 10, 11, 4]), 0, 5)
    keys, values = mx.random.normal((5, 1, 8)), mx.zeros((5, 1, 0))
    pages = backend.store(pages, keys, values, metadata)
    later = PrefillMetadata(mx.array([[2, 1]]), mx.array([5]), 5, 1)
    new = mx.ones((1, 1, 1, 8)), mx.zeros((1, 1, 1, 0))
    fetched_keys, fetched_values = backend.fetch(pages, *new, later)
    assert mx.array_equal(fetched_keys[0, 0, :5], keys[:, 0])
    assert fetched_values.shape == (1, 1, 6, 0)
