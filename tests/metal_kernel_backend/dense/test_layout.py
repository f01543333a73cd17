"""What the kernels are told of dense pages."""

import mlx.core as mx
import pytest

from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout

HALF, FLOAT = mx.float16, mx.float32


def layout(dtype=HALF, key=64, value=64, heads=2, block=16, padding=0) -> DenseLayout:
    page = block * heads * (key + value) * dtype.size + padding
    return DenseLayout(dtype, key, value, heads, block, page)


@pytest.mark.parametrize(
    ("given", "widest"),
    [
        ({}, 16),
        ({"key": 128, "dtype": FLOAT}, 16),
        ({"key": 36}, 8),
        ({"value": 20}, 8),
        ({"key": 5}, 2),
        ({"key": 5, "dtype": FLOAT}, 4),
        ({"padding": 4}, 4),
        ({"padding": 48}, 16),
    ],
)
def test_the_widest_load_divides_keys_values_and_pages(given, widest):
    assert layout(**given).vector_bytes == widest


@pytest.mark.parametrize(
    ("key", "value", "elements"),
    [(8, 8, 8), (128, 128, 8), (256, 64, 8), (64, 320, 16), (512, 512, 16)],
)
def test_32_lanes_hold_a_vector(key, value, elements):
    found = layout(key=key, value=value)
    assert found.lane_elements == elements and 32 * elements >= max(key, value)


def test_the_shape_of_the_pages_is_in_elements():
    assert layout(padding=48).pages_shape(3) == (3, 16 * 2 * 128 + 24)
