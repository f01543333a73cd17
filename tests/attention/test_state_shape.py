"""Bytes of a recurrent state."""

import mlx.core as mx

from vllm_metal.attention.state_shape import StateShape


def test_bytes_are_those_of_all_arrays():
    shape = StateShape(((3, 5), None, (2, 4, 4)), (mx.bfloat16, None, mx.float32))
    assert shape.num_bytes == 3 * 5 * 2 + 2 * 4 * 4 * 4
    assert shape.page_bytes == shape.num_bytes


def test_a_page_is_even():
    assert StateShape(((3,),), (mx.uint8,)).page_bytes == 4
