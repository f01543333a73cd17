"""Products with packed vectors equal products with what the codec gives back."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack
from vllm_metal.metal_kernel_backend.turboquant.codec import Quantizer
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.products import (
    PackedVectors,
    output_matrix,
    query_matrices,
)
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs

SIZES = (64, 80, 128)


@pytest.fixture(params=[(name, size) for name in KEY_FORMATS for size in SIZES], ids=str)
def vectors(request):
    """(packed, halfwords [2, 3, 5, D b / 16], centroids [2, 3, 5, D])."""
    name, size = request.param
    format = KEY_FORMATS[name]
    rng = np.random.default_rng(size)
    codes = mx.array(rng.integers(0, format.num_codes, (2, 3, 5, size)).astype(np.uint8))
    centroids = Quantizer(format, size, unbiased=False).centroids(codes)
    return PackedVectors(format, size), pack(codes, format.bits), centroids


def close(actual, expected):
    np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=1e-4, atol=2e-4)


def test_order_is_a_permutation(vectors):
    packed, _, _ = vectors
    assert sorted(packed.order.tolist()) == list(range(packed.head_size))


def test_centroids(vectors):
    packed, halfwords, centroids = vectors
    close(packed.centroids(halfwords), centroids[..., packed.order])


def test_products(vectors):
    packed, halfwords, centroids = vectors
    queries = mx.random.normal((2, 3, 4, packed.head_size), key=mx.random.key(1))
    expected = queries @ centroids.swapaxes(-1, -2)
    close(packed.products(queries[..., packed.order], halfwords), expected)


def test_weighted_sum(vectors):
    packed, halfwords, centroids = vectors
    weights = mx.softmax(mx.random.normal((2, 3, 4, 5), key=mx.random.key(2)), axis=-1)
    close(packed.weighted_sum(weights, halfwords), (weights @ centroids)[..., packed.order])


@pytest.mark.parametrize("size", SIZES)
def test_matrices_rotate_in_the_vectors_order(size):
    order = PackedVectors(KEY_FORMATS["q3_0"], size).order
    rng = np.random.default_rng(0)
    multiplier = np.exp(rng.normal(size=(2, size))).astype(np.float32)
    queries = mx.array(rng.normal(size=(2, 4, size)).astype(np.float32))
    factors = mx.array(signs(size) / multiplier)[:, None]
    close(queries @ query_matrices(multiplier, order), rotate(queries * factors)[..., order])
    values = rotate(queries * mx.array(signs(size)))
    close(values[..., order] @ output_matrix(order), queries)
