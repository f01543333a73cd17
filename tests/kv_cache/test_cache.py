"""The owner of the pages: written in place, copied exactly, counted truly."""

import mlx.core as mx
import numpy as np
import pytest

from tests.dense_pages import keys_and_values
from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense import DensePages

BLOCK = 16
SHAPE = LayerShape(num_kv_heads=2, head_size=64, head_size_v=32)


def cache_of(num_blocks: int, layers: int = 2, dtype: mx.Dtype = mx.float32) -> KVCache:
    return KVCache([DensePages(SHAPE, BLOCK, dtype) for _ in range(layers)], num_blocks)


def decode_metadata(seq_lens: list[int], blocks_each: int) -> DecodeMetadata:
    """Request i owns the `blocks_each` blocks after block `1 + i * blocks_each`."""
    table = 1 + np.arange(len(seq_lens) * blocks_each, dtype=np.int32).reshape(len(seq_lens), -1)
    last = np.array(seq_lens) - 1
    slots = table[np.arange(len(last)), last // BLOCK] * BLOCK + last % BLOCK
    return DecodeMetadata(
        block_table=mx.array(table),
        seq_lens=mx.array(seq_lens),
        slot_mapping=mx.array(slots),
        offset=mx.array(last),
        max_seq_len=max(seq_lens),
    )


def kv(count: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    """Keys [T, H, Dk] and values [T, H, Dv]."""
    keys = mx.random.normal((count, SHAPE.num_kv_heads, SHAPE.head_size), key=mx.random.key(seed))
    return keys, keys[..., : SHAPE.head_size_v] + 1


def test_bytes_are_those_of_the_arrays():
    cache = cache_of(num_blocks=9)
    assert cache.nbytes == 9 * sum(backend.page_size_bytes for backend in cache.backends)
    assert cache.nbytes == sum(array.nbytes for array in cache.arrays)


def test_a_store_is_in_place():
    """Stepwise store and decode, as the engine runs them, never hold a second array of pages."""
    cache = cache_of(num_blocks=4097)
    query = mx.random.normal((2, 4, SHAPE.head_size))
    mx.eval(query)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for step in range(1, 61):
        metadata = decode_metadata([step, step + 3], blocks_each=4)
        outs = []
        for layer, backend in enumerate(cache.backends):
            cache.store(layer, *kv(2, seed=step), metadata)
            outs.append(backend.decode(cache.pages(layer), query, metadata, 1.0, None))
        mx.eval(outs, cache.arrays)
    assert mx.get_peak_memory() - before < cache.nbytes // 100


def test_a_prefill_store_is_in_place():
    cache = cache_of(num_blocks=2049)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for step in range(20):
        slots = mx.arange(64) + (1 + 4 * step) * BLOCK
        metadata = PrefillMetadata(mx.arange(1, 5)[None] + 4 * step, slots, 0, 64)
        for layer in range(2):
            cache.store(layer, *kv(64, seed=step), metadata)
        mx.eval(cache.arrays)
    assert mx.get_peak_memory() - before < cache.nbytes // 100


def test_a_store_goes_to_its_slots_of_its_layer_only():
    cache = cache_of(num_blocks=4)
    keys, values = kv(3)
    metadata = PrefillMetadata(mx.array([[2, 1]]), mx.array([46, 47, 16]), 14, 3)
    cache.store(1, keys, values, metadata)
    mx.eval(cache.arrays)
    assert not any(array.any().item() for array in cache.pages(0))
    pages = keys_and_values(cache.backends[1], cache.pages(1))
    for page, new in zip(pages, (keys, values), strict=True):
        assert mx.array_equal(page[2, :, 14], new[0])
        assert mx.array_equal(page[2, :, 15], new[1])
        assert mx.array_equal(page[1, :, 0], new[2])
        assert (page != 0).sum().item() == new.size


@pytest.mark.parametrize("copies", [[(1, 5)], [(1, 5), (2, 6), (3, 4)], [(1, 5), (1, 6)]])
def test_copied_blocks(copies):
    cache = cache_of(num_blocks=8)
    slots = mx.arange(3 * BLOCK) + BLOCK
    for layer in range(2):
        metadata = PrefillMetadata(mx.array([[1, 2, 3]]), slots, 0, 3 * BLOCK)
        cache.store(layer, *kv(3 * BLOCK, seed=layer), metadata)
    mx.eval(cache.arrays)
    before = [np.array(array) for array in cache.arrays]
    cache.copy_blocks(copies)
    for array, old in zip(cache.arrays, before, strict=True):
        expected = old.copy()
        for source, destination in copies:
            expected[destination] = old[source]
        np.testing.assert_array_equal(np.array(array), expected)


def test_copying_blocks_is_in_place():
    cache = cache_of(num_blocks=2049)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for source in range(1, 50):
        cache.copy_blocks([(source, source + 100)])
    assert mx.get_peak_memory() - before < cache.nbytes // 100
