"""The memory of a region: one array, seen as each of its layers wants it."""

import mlx.core as mx
import pytest

from vllm_metal.kv_cache.region_memory import RegionMemory, finish


@pytest.mark.parametrize(
    ("dtypes", "own"),
    [
        ({mx.float32}, mx.float32),
        ({mx.bfloat16}, mx.bfloat16),
        ({mx.float16, mx.uint16}, mx.uint16),
        (set(), mx.uint16),
    ],
    ids=str,
)
def test_bytes_do_not_depend_on_the_type(dtypes, own):
    region = RegionMemory(5, 48, dtypes)
    assert region.array.dtype == region.dtype == own
    assert region.array.shape == (5, 48 // own.size)
    assert region.array.nbytes == 5 * 48


def test_a_view_is_the_same_bytes():
    region = RegionMemory(2, 8, {mx.float16, mx.uint16})
    halves = region.view(mx.float16)
    halves[1] = mx.array([1.0, 2.0, 3.0, 4.0], mx.float16)
    region.replace(halves)
    assert region.array.dtype == mx.uint16
    assert region.array[1, 0].item() == 0x3C00
    assert region.view(mx.float16)[1].tolist() == [1, 2, 3, 4]
    assert region.view(mx.uint16) is region.array


def test_blocks_are_copied_before_any_is_written():
    region = RegionMemory(4, 4, {mx.uint16})
    region.replace(mx.arange(8, dtype=mx.uint16).reshape(4, 2))
    region.copy([1, 2], [2, 3])
    finish(region.array)
    assert region.array.tolist() == [[0, 1], [2, 3], [2, 3], [4, 5]]
