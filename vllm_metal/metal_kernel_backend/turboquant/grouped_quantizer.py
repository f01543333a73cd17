"""Rotated keys to codes, levels and a scale, and back, in plain MLX. The oracle of the kernels.

A vector y, limited to +-2^24, is stored as codes x, a level for each 16 coordinates, and a scale:
scale * weight(level) * c1 x, weight(level) = (LEVEL_BASE + level) * LEVEL_UNIT. For five candidate
scales t = largest |y_i| * factor:

1. A group tries the lowest level whose grid reaches its largest magnitude, and the next two. With
   a level, each coordinate takes the cell it lies in: the number of bounds i * w that are at most
   |y_i|, w = t * weight * c1, i = 1, 2, ... Its centroid, the middle of the cell, has the
   magnitude c_i, before t. The level with the least error t^2 <c, c> - 2 t <y, c> is taken, the
   first among equals.
2. The candidate with the largest <y, c>^2 / <c, c> wins, the first among equals. The scale stored
   is <y, c> / <c, c>, which has the least squared error.

Rounding, the order of sums, and what is stored of a vector that is not finite are defined as in
`quantizer`. Weights and centroids are exact.
"""

import mlx.core as mx

from vllm_metal.metal_kernel_backend.turboquant.formats import (
    GROUP_SIZE,
    LEVEL_BASE,
    LEVEL_UNIT,
    NUM_LEVELS,
    Format,
)
from vllm_metal.metal_kernel_backend.turboquant.quantizer import (
    COORDINATE_LIMIT,
    MAX_SCALE,
    NAN_SCALE,
    Quantized,
    are_finite,
    multiples,
)
from vllm_metal.metal_kernel_backend.turboquant.rotation import tree_sum

TRIED_LEVELS = 3

SLICE = 1 << 17
"""Coordinates that are quantised at a time: each takes 15 float32 in several arrays."""


class GroupedQuantizer:
    """Rotated keys of one size to codes, levels and scales, and back.

    Args:
        format: one that `has_levels` at this size.
        head_size: D.
    """

    def __init__(self, format: Format, head_size: int):
        self.half = format.num_codes // 2
        self.step = float(format.coefficients(head_size)[0])
        self.factors = mx.array(format.scale_factors(head_size))[:, None, None, None]
        self.num_groups = head_size // GROUP_SIZE

    def quantize(self, y: mx.array) -> Quantized:
        """Rotated keys, float32 [..., D]."""
        *lead, size = y.shape
        rows = y.reshape(-1, size)
        each = max(1, SLICE // size)
        slices = [self._quantize(rows[i : i + each]) for i in range(0, len(rows), each)]
        codes, scales, levels = (mx.concatenate(list(parts)) for parts in zip(*slices, strict=True))
        return Quantized(
            codes.reshape(*lead, size), scales.reshape(lead), levels=levels.reshape(*lead, -1)
        )

    def dequantize(self, quantized: Quantized) -> mx.array:
        """The keys the codes stand for, still rotated, float32 [..., D]."""
        assert quantized.levels is not None, "keys of this format have levels"
        centroids = self.centroids(quantized.codes)
        groups = centroids.reshape(*centroids.shape[:-1], self.num_groups, GROUP_SIZE)
        weighted = (groups * level_weights(quantized.levels)[..., None]).reshape(centroids.shape)
        return weighted * quantized.scales.astype(mx.float32)[..., None]

    def centroids(self, codes: mx.array) -> mx.array:
        """The centroid of each code, float32, before level and scale. Codes of any type."""
        return (codes.astype(mx.float32) - (self.half - 0.5)) * self.step

    def _quantize(self, y: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Vectors [N, D] to codes [N, D], scales [N] and levels [N, D / 16]."""
        finite = are_finite(y)
        y = mx.where(finite, y, 0)
        magnitude = mx.minimum(mx.abs(y), COORDINATE_LIMIT).reshape(
            -1, 1, self.num_groups, 1, GROUP_SIZE
        )
        reach = mx.max(magnitude, axis=-1, keepdims=True)
        # axes: vector, candidate scale, group, level tried, coordinate
        scales = mx.max(reach, axis=2, keepdims=True) * self.factors
        levels = self._levels(reach, scales)
        weights = level_weights(levels) * self.step
        steps = multiples(magnitude, scales * weights, self.half - 1)
        centroids = (steps + 0.5) * weights
        along = tree_sum(magnitude * centroids)
        gain = 2 * along - scales * tree_sum(centroids * centroids)
        best = mx.argmax(gain, axis=3, keepdims=True)
        steps, centroids, levels = (
            mx.take_along_axis(x, best, axis=3).squeeze(3) for x in (steps, centroids, levels)
        )
        flat = len(y), self.factors.size, -1
        centroids = centroids.reshape(flat)
        along = tree_sum(magnitude.reshape(len(y), 1, -1) * centroids)
        energy = tree_sum(centroids * centroids)
        best = mx.argmax(along * along / energy, axis=1, keepdims=True)
        scale, steps, levels = (
            mx.take_along_axis(x.reshape(flat), best, axis=1).squeeze(1)
            for x in (along / energy, steps, levels)
        )
        scale = mx.where(finite, mx.minimum(scale, MAX_SCALE).astype(mx.float16), NAN_SCALE)
        scale = scale.squeeze(-1)
        return mx.where(y >= 0, self.half + steps, self.half - 1 - steps), scale, levels

    def _levels(self, reach: mx.array, scales: mx.array) -> mx.array:
        """The levels that a group tries: int32 [..., TRIED_LEVELS, 1].

        A grid of level l ends at (LEVEL_BASE + l) units of t * 4 * LEVEL_UNIT.
        """
        highest = LEVEL_BASE + NUM_LEVELS - 1
        filled = multiples(reach, scales * (4 * LEVEL_UNIT), highest).astype(mx.int32)
        lowest = mx.clip(filled + 1 - LEVEL_BASE, 0, NUM_LEVELS - TRIED_LEVELS)
        return lowest + mx.arange(TRIED_LEVELS)[:, None]


def level_weights(levels: mx.array) -> mx.array:
    """What the centroids of a group are multiplied by, float32; exact."""
    return (levels.astype(mx.float32) + LEVEL_BASE) * LEVEL_UNIT
