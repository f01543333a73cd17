"""The owner of the pages: written in place, copied exactly, counted truly."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.pages import keys_and_values
from vllm_metal.attention.backend import LayerShape, Rows
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata, StateMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache import group_metadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import AttentionGroup, CacheLayout, Region, StateGroup
from vllm_metal.metal_kernel_backend.dense.reference import DensePages

BLOCK = 16
SHAPE = LayerShape(num_kv_heads=2, head_size=64, head_size_v=32)


def cache_of(num_blocks: int, layers: int = 2, dtype: mx.Dtype = mx.float32) -> KVCache:
    return KVCache([DensePages(SHAPE, BLOCK, dtype) for _ in range(layers)], num_blocks)


def decode_metadata(seq_lens: list[int], blocks_each: int) -> DecodeMetadata:
    """Request i owns the `blocks_each` blocks after block `1 + i * blocks_each`."""
    table = 1 + np.arange(len(seq_lens) * blocks_each, dtype=np.int32).reshape(len(seq_lens), -1)
    positions = np.array(seq_lens, np.int32) - 1
    [metadata] = group_metadata.decode_metadata([AttentionGroup(BLOCK)], [table], positions)
    return metadata


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
            outs.append(backend.decode(cache.pages(layer), Rows(query, metadata, 1.0)))
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
    assert not cache.pages(0).array.any().item()
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


WINDOW = replace(SHAPE, sliding_window=8)
STATE = StateShape(((40, 25),), (mx.float32,))


def shared_cache(num_blocks: int) -> KVCache:
    """Two layers and a state in the same bytes, each a group of its own."""
    backends = [DensePages(shape, BLOCK, mx.float32) for shape in (SHAPE, WINDOW)]
    groups = (
        AttentionGroup(BLOCK, layers=(0,)),
        AttentionGroup(BLOCK, layers=(1,), sliding_window=8),
        StateGroup((0,), 100),
    )
    region = Region(backends[0].page_size_bytes, layers=(0, 1), states=(0,))
    return KVCache(backends, num_blocks, [STATE], CacheLayout(groups, (region,)))


def test_layers_that_share_bytes_keep_to_their_blocks():
    cache = shared_cache(num_blocks=6)
    assert cache.shares_arrays and cache.nbytes == 6 * cache.backends[0].page_size_bytes
    metadata = [decode_metadata([3], blocks_each=1), decode_metadata([9], blocks_each=1)]
    metadata[1] = replace(metadata[1], block_table=mx.array([[2]]), slot_mapping=mx.array([40]))
    state = StateMetadata(mx.array([4]), mx.array([4]), begins=True)
    cache.begin_forward((*metadata, state))
    for layer in range(2):
        cache.store(layer, *kv(1, seed=layer), metadata[layer])
    cache.states.keep(0, [mx.arange(1000.0).reshape(1, 40, 25)])
    cache.evaluate()
    [array] = cache.arrays
    assert array.dtype == mx.uint16
    assert [block for block in range(6) if array[block].any()] == [1, 2, 4]
    for layer, (block, token) in enumerate(((1, 2), (2, 8))):
        pages = keys_and_values(cache.backends[layer], cache.pages(layer))
        for page, new in zip(pages, kv(1, seed=layer), strict=True):
            assert mx.array_equal(page[block, :, token], new[0])
    cache.begin_forward((*metadata, replace(state, begins=False)))
    [old] = cache.states.old(0)
    assert mx.array_equal(old, mx.arange(1000.0).reshape(1, 40, 25))


def test_shared_bytes_are_written_in_place():
    """Several writes of one array in every forward, lazily, with readers in between."""
    cache = shared_cache(num_blocks=4097)
    query = mx.random.normal((2, 4, SHAPE.head_size))
    mx.eval(query)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for step in range(1, 31):
        rows = decode_metadata([step, step + 3], blocks_each=4)
        state = StateMetadata(mx.array([4000, 4001]), mx.array([4000, 4001]), begins=step == 1)
        cache.begin_forward((rows, rows, state))
        outs, out = [], query
        for layer, backend in enumerate(cache.backends):
            keys, values = kv(2, seed=step)
            cache.store(layer, keys + mx.mean(out), values, rows)
            out = backend.decode(cache.pages(layer), Rows(query, rows, 1.0))
            outs.append(out)
        cache.states.keep(0, [mx.full((2, 40, 25), step) + mx.mean(out)])
        cache.evaluate(*outs)
    assert mx.get_peak_memory() - before < cache.nbytes // 50


class StoresThrough(DensePages):
    stores_through = True


def test_kernels_write_all_pages_or_they_do_not():
    """A layer on MLX operations, or a recurrent state, is enough that MLX writes some."""
    through, dense = (kind(SHAPE, BLOCK, mx.float32) for kind in (StoresThrough, DensePages))
    assert KVCache([through, through], 3).stores_through
    assert not KVCache([through, dense], 3).stores_through
    assert not KVCache([through], 3, [STATE]).stores_through


def test_layers_of_one_region_that_store_through_it_need_no_evaluation():
    backends = [StoresThrough(shape, BLOCK, mx.float32) for shape in (SHAPE, WINDOW)]
    groups = (AttentionGroup(BLOCK, (0,)), AttentionGroup(BLOCK, (1,), sliding_window=8))
    region = Region(backends[0].page_size_bytes, layers=(0, 1))
    assert not KVCache(backends, 3, (), CacheLayout(groups, (region,))).shares_arrays


def test_taken_arrays_are_put_back():
    cache = cache_of(num_blocks=4)
    before = [id(array) for array in cache.arrays]
    cache.put(cache.take())
    assert [id(array) for array in cache.arrays] == before
