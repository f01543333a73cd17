"""Products with packed vectors, for the plain MLX path: few operations, no rearranging.

Codes are taken as `bitpack.lanes` gives them, bytes left over included. Only the small side of a
product knows: the rotations of queries and outputs are matrices here, whose columns and rows are in
the order of the lanes, and 0 where a lane holds nothing.

Rows are multiplied one at a time, [..., 1, K] @ [..., K, N]: a BLAS spends more on dividing a thin
product among threads than on the product.
"""

from functools import cache

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.bitpack import lane_elements, lanes
from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import level_weights
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs


class PackedVectors:
    """Reads packed codes of one format and size as points to multiply with.

    A point is the centroid divided by `gain`, the highest coefficient of the codebook polynomial:
    where the codebook is uniform, the code itself, less the middle one.
    """

    def __init__(self, format: Format, head_size: int):
        self._bits = format.bits
        self._middle = (format.num_codes - 1) / 2
        *lower, highest = format.coefficients(head_size).astype(np.float64)
        self.gain = float(highest)
        self._lower = [float(coefficient / highest) for coefficient in reversed(lower)]
        elements = lane_elements(head_size, format.bits)
        self._ends = np.cumsum([part.size for part in elements]).tolist()
        self._elements = np.concatenate(elements)

    def rows(self, matrix: np.ndarray) -> np.ndarray:
        """What to multiply points with for centroids times `matrix`: [D, N] to [L, N]."""
        return np.where(self._elements[:, None] < 0, 0, matrix[self._elements] * self.gain)

    def products(
        self,
        queries: mx.array,  # [B, H, G, Q, L]
        halfwords: mx.array,  # uint16 [B, H, 1, S, D * bits / 16]
        levels: mx.array | None = None,  # uint16 [B, H, 1, S, D / 16]
    ) -> mx.array:  # [B, H, G, Q, S]
        """Dot products of the points with queries whose columns are those of `rows`."""
        points = self._points(halfwords)
        if levels is not None:
            weights = level_weights(levels)[..., None]
            points = [
                (part.reshape(*levels.shape, -1) * weights).reshape(part.shape) for part in points
            ]
        first, *rest = points
        if not rest:
            return queries @ first.swapaxes(-1, -2)
        end = self._ends[0]
        total = queries[..., :end] @ first.swapaxes(-1, -2)
        return total + queries[..., end:] @ rest[0].swapaxes(-1, -2)

    def weighted_sum(
        self,
        weights: mx.array,  # [B, H, G, Q, S]
        halfwords: mx.array,  # uint16 [B, H, 1, S, D * bits / 16]
    ) -> mx.array:  # [B, H, G, Q, L]
        """Sums of the points under weights, to be multiplied with `rows`."""
        sums = [weights @ points for points in self._points(halfwords)]
        return sums[0] if len(sums) == 1 else mx.concatenate(sums, axis=-1)

    def _points(self, halfwords: mx.array) -> list[mx.array]:
        return [self._convert(codes) for codes in lanes(halfwords, self._bits)]

    def _convert(self, codes: mx.array) -> mx.array:
        x = codes.astype(mx.float32) - self._middle
        if not self._lower:
            return x
        square = x * x
        value = square + self._lower[0]
        for coefficient in self._lower[1:]:
            value = square * value + coefficient
        return value * x


def query_matrices(multiplier: np.ndarray, keys: PackedVectors) -> mx.array:
    """Queries to what is multiplied with the points of keys: float32 [H, 1, D, L].

    Args:
        multiplier: [H, D], from calibration.
        keys: how keys are read.
    """
    size = multiplier.shape[-1]
    rotation = keys.rows(_rotation(size)).T
    return mx.array(((signs(size) / multiplier)[:, None, :, None] * rotation).astype(np.float32))


def output_matrix(values: PackedVectors, head_size: int) -> mx.array:
    """Sums of the points of values to outputs: float32 [1, L, D]."""
    matrix = values.rows(_rotation(head_size) * signs(head_size))
    return mx.array(matrix[None].astype(np.float32))


@cache
def _rotation(head_size: int) -> np.ndarray:
    """R, float32 [D, D]; symmetric."""
    return np.array(rotate(mx.eye(head_size)))
