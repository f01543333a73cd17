"""Arrays long enough to lie in the device address space."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW, lengthened


@pytest.mark.parametrize("length", range(1, 12))
def test_vectors_are_filled_up_behind_their_end(length):
    vector = mx.arange(length)
    longer = lengthened(vector, filler=-1)
    assert longer.size == max(length, CONSTANT_BELOW) and longer.dtype == vector.dtype
    np.testing.assert_array_equal(longer[:length], vector)
    assert (longer[length:] == -1).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 3), (3, 3), (1, 8), (16, 1)])
def test_tables_get_more_rows_of_the_same_length(shape):
    table = mx.ones(shape, mx.int32)
    longer = lengthened(table, filler=0)
    assert longer.size >= CONSTANT_BELOW and longer.shape[1] == shape[1]
    assert longer.shape == shape or longer.size - shape[1] < CONSTANT_BELOW
    assert mx.sum(longer).item() == table.size


def test_a_long_array_is_itself():
    array = mx.zeros((8,))
    assert lengthened(array, filler=1) is array
