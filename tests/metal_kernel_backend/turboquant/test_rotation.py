"""The rotation: orthonormal, its own inverse, and rounded in the order it promises."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs, tree_sum

HEAD_SIZES = (16, 64, 80, 96, 112, 128, 160, 192, 256, 512)


def wide(head_size: int) -> np.ndarray:
    """Vectors whose coordinates span many orders of magnitude, float32 [40, 3, D]."""
    rng = np.random.default_rng(head_size)
    scale = np.exp(3 * rng.standard_normal((40, 3, head_size)))
    return (scale * rng.standard_normal((40, 3, head_size))).astype(np.float32)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_matrix_is_orthonormal_and_symmetric(head_size):
    matrix = np.array(rotate(mx.eye(head_size)), np.float64)
    np.testing.assert_allclose(matrix, reference.rotation_matrix(head_size), atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_size), atol=1e-5)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rounding_is_that_of_the_stated_order(head_size):
    x = wide(head_size)
    assert (np.array(rotate(mx.array(x))) == reference.rotate(x)).all()
    assert (np.array(tree_sum(mx.array(x)))[..., 0] == reference.tree_sum(x)).all()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotating_twice_returns_the_vector(head_size):
    x = wide(head_size)
    error = np.abs(np.array(rotate(rotate(mx.array(x)))) - x).max(axis=-1)
    assert (error <= 1e-6 * np.abs(x).max(axis=-1)).all()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_signs_are_balanced_and_fixed(head_size):
    values = signs(head_size)
    assert set(values.tolist()) == {-1.0, 1.0}
    assert abs(values.sum()) <= head_size / 2
    assert (values == signs(512)[:head_size]).all()


def test_first_signs_by_hand():
    """The hash of 0x9E3779B1, 2 * 0x9E3779B1, ... in Python's own integers."""

    def sign(i: int) -> int:
        h = (i + 1) * 0x9E3779B1 & 0xFFFFFFFF
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return -1 if (h ^ h >> 16) >> 31 else 1

    assert signs(64).tolist() == [sign(i) for i in range(64)]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_constant_vectors_are_spread(head_size):
    """With the signs no coordinate of a rotated constant vector is far above the others."""
    rotated = np.array(rotate(mx.array(signs(head_size))))
    assert np.abs(rotated).max() < 4


@pytest.mark.parametrize("head_size", [0, 8, 63, 100, 144])
def test_sizes_without_a_rotation_are_refused(head_size):
    with pytest.raises(ValueError, match=f"head size {head_size} has no rotation; allowed"):
        rotate(mx.zeros((2, head_size)))
