"""Products with packed vectors equal products with what the codec gives back."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.products import (
    PackedVectors,
    output_matrix,
    query_matrices,
)
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized

B, H, G, S = 2, 3, 4, 5


WITHOUT_LEVELS = KEY_FORMATS | VALUE_FORMATS


@pytest.fixture(params=[(name, size) for name in KEY_FORMATS for size in (64, 80, 128)], ids=str)
def case(request):
    """(format, head size, halfwords [B, H, 1, S, D b / 16], codes [B, H, S, D])."""
    name, size = request.param
    format = WITHOUT_LEVELS[name]
    rng = np.random.default_rng(size)
    codes = mx.array(rng.integers(0, format.num_codes, (B, H, S, size)).astype(np.uint8))
    return format, size, pack(codes, format.bits)[:, :, None], codes


def close(actual, expected):
    np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=1e-4, atol=5e-4)


def test_products_with_queries(case):
    """Queries times their matrices times numbers are rotated queries times centroids."""
    format, size, halfwords, codes = case
    multiplier = np.exp(0.5 * np.random.default_rng(0).normal(size=(H, size))).astype(np.float32)
    queries = mx.random.normal((B, H, G, size), key=mx.random.key(1))
    codec = KeyCodec(format, np.zeros((H, size), np.float32), multiplier)
    rotated = codec.rotate_queries(queries.reshape(B, H * G, size)).reshape(queries.shape)
    expected = rotated @ codec.quantizer.centroids(codes).swapaxes(-1, -2)
    packed = PackedVectors(format, size)
    rows = queries[..., None, :] @ query_matrices(multiplier, packed)
    close(packed.products(rows, halfwords)[..., 0, :], expected)


@pytest.mark.parametrize("name", ["q8_0", "q6_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("size", [128, 160])
def test_products_with_queries_under_levels(name, size):
    """Products are those with what the codec reads: centroids times weights of their levels."""
    format = KEY_FORMATS[name]
    rng = np.random.default_rng(size)
    codes = mx.array(rng.integers(0, format.num_codes, (B, H, S, size)).astype(np.uint8))
    levels = mx.array(rng.integers(0, 16, (B, H, S, size // 16)).astype(np.uint16))
    queries = mx.random.normal((B, H, G, size), key=mx.random.key(1))
    codec = KeyCodec(format, np.zeros((H, size), np.float32), np.ones((H, size), np.float32))
    keys = codec.quantizer.dequantize(Quantized(codes, mx.ones((B, H, S)), levels=levels))
    rotated = codec.rotate_queries(queries.reshape(B, H * G, size)).reshape(queries.shape)
    packed = PackedVectors(format, size)
    rows = queries[..., None, :] @ query_matrices(np.ones((H, size)), packed)
    halfwords = pack(codes, format.bits)[:, :, None]
    got = packed.products(rows, halfwords, levels[:, :, None])[..., 0, :]
    close(got, rotated @ keys.swapaxes(-1, -2))


def test_weighted_sum_to_outputs(case):
    """Sums of numbers times the output matrix are unrotated sums of centroids."""
    format, size, halfwords, codes = case
    codec = ValueCodec(format, size)
    weights = mx.softmax(mx.random.normal((B, H, G, S), key=mx.random.key(2)), axis=-1)
    expected = codec.unrotate_outputs(weights @ codec.quantizer.centroids(codes))
    packed = PackedVectors(format, size)
    out = packed.weighted_sum(weights[..., None, :], halfwords) @ output_matrix(packed, size)
    close(out[..., 0, :], expected)


def test_gain_times_numbers_are_centroids(case):
    """What a query of ones in the lanes gives: needed for formats with a bias."""
    format, size, halfwords, codes = case
    packed = PackedVectors(format, size)
    ones = mx.array(packed.rows(np.ones((size, 1), np.float32)).T.astype(np.float32))
    centroids = ValueCodec(format, size).quantizer.centroids(codes)
    products = packed.products(mx.broadcast_to(ones, (B, H, 1, 1, ones.size)), halfwords)
    close(products[:, :, 0, 0], centroids.sum(axis=-1))
