"""Rotated vectors to codes and scales, and back, in plain MLX. The oracle of the kernels.

A rotated vector y is stored as codes and a scale:

1. y is limited to +-2^24. For five candidate scales t = largest |y_i| * factor, each coordinate
   takes the code whose cell it lies in: of the positive midpoints p it counts those with
   p * t <= |y_i|, which gives the magnitude of the centroid c_i; the sign is that of y_i, + for 0.
2. The candidate with the largest <y, c>^2 / <c, c> wins, the first among equals: its direction is
   closest to y.
3. A key is stored with the scale <y, c> / <c, c>, which has the least squared error. A value is
   stored with <y, y> / <y, c>: unbiased, because the errors of many values are averaged and a
   scale of least squares would shrink their sum.

Affine formats first subtract bias = (max + min) / 2, rounded to float16, and store it.

Every operation is in float32 and rounded on its own (no fused multiply-add); sums are
`rotation.tree_sum`. So the stored bytes are defined, and kernels are held to them.

A vector y with a coordinate that is NaN or infinite is stored as zeros would be, but with the scale
`NAN_SCALE`. Its codes stand for finite numbers, so only what takes the scale becomes NaN: the
output of every query that sees the vector, and no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.rotation import tree_sum

COORDINATE_LIMIT = 2.0**24
"""Rotated coordinates beyond it are cut: no float16 scale reaches them, and squares stay finite."""

MAX_SCALE = 65504.0
"""The largest float16."""

NAN_BITS = 0x7E00
"""A NaN of float16."""

NAN_SCALE = mx.array(NAN_BITS, mx.uint16).view(mx.float16)
"""The scale of a vector that is not finite. By its bits, because backends of MLX write the NaN of a
conversion with different ones."""

BELOW = 1 - 2.0**-20
"""Makes a quotient smaller by more than rounding, its own and that of a product, could add."""

SMALL = 1 << 14
"""Up to this many coordinates it is the number of operations that counts: all comparisons are made
in one, and both sums of a candidate. Beyond, one by one."""

IS_ENERGY = mx.array([False, True])[:, None, None]
"""Tells <c, c> from <y, c> where both are summed up in one."""


@dataclass(frozen=True)
class Quantized:
    """Vectors as stored, but for the packing of their codes."""

    codes: mx.array
    """[..., D], float32 from a `Quantizer`, uint8 from pages."""
    scales: mx.array
    """float16 [...]."""
    biases: mx.array | None = None
    """float16 [...]; None unless the format has them."""
    levels: mx.array | None = None
    """[..., D / 16], whole numbers of 0 to 15; None unless the format has them."""


class Quantizer:
    """Rotated vectors of one size to codes and scales, and back. Without levels.

    Args:
        kinds: format, and whether its scale is unbiased (values) or has the least squared error
            (keys). Vectors of F kinds lie side by side, on the axis before D; each step is then one
            operation for all of them, with constants of each.
        head_size: D.
    """

    def __init__(self, kinds: Sequence[tuple[Format, bool]], head_size: int):
        formats = [format for format, _ in kinds]
        self.half = _each([format.num_codes // 2 for format in formats])
        self.has_bias = _flags([format.has_bias for format in formats])
        self.unbiased = _flags([unbiased for _, unbiased in kinds])
        self.any_uniform = any(format.degree == 1 for format in formats)
        polynomials = [format.coefficients(head_size) for format in formats]
        self.coefficients = [_each(terms) for terms in zip_longest(*polynomials, fillvalue=0)]
        factors = [format.scale_factors(head_size)[:, None] for format in formats]
        self.factors = _each(factors)
        self.widths = _each([f * c[0] for f, c in zip(factors, polynomials, strict=True)])
        """`factors` times c1, which is a power of two in a uniform format."""
        self.last = _each([(f.num_codes // 2 - 1) * (f.degree == 1) for f in formats])
        """The most steps in a uniform format, and 0 in others."""
        self.midpoints = _positive_midpoints(formats, head_size)

    def quantize(self, y: mx.array) -> Quantized:
        """Rotated vectors, float32 [..., D], or [..., F, D] of F kinds."""
        lead = y.shape[:-1]
        stored = self.quantize_spread(y[..., None, None, :])
        return Quantized(
            stored.codes.reshape(y.shape),
            stored.scales.reshape(lead),
            None if stored.biases is None else stored.biases.reshape(lead),
        )

    def quantize_spread(self, y: mx.array) -> Quantized:
        """`quantize` of [..., 1, 1, D], to codes of that shape, scales and biases [..., 1, 1, 1].

        The axes of 1 hold M midpoints or 2 sums, and 5 candidates, on the way.
        """
        biases = None
        finite = are_finite(y)
        y = mx.where(finite, y, 0)
        if self.has_bias is not None:
            y = mx.clip(y, -COORDINATE_LIMIT, COORDINATE_LIMIT)
            biases = mx.where(self.has_bias, _middle(y), mx.array(0, mx.float16))
            y = y - biases.astype(mx.float32)
        magnitude = mx.minimum(mx.abs(y), COORDINATE_LIMIT)
        steps = self._steps(magnitude, mx.max(magnitude, axis=-1, keepdims=True))
        along, energy = _sums(magnitude, self._polynomial(steps + 0.5))
        best = mx.argmax(along * along / energy, axis=-2, keepdims=True)
        scales = along / energy
        if self.unbiased is not None:
            norm = tree_sum(magnitude * magnitude)
            scales = mx.where(self.unbiased, norm / mx.where(along > 0, along, 1.0), scales)
        scales = mx.minimum(scales, MAX_SCALE).astype(mx.float16)
        scales = mx.where(finite, mx.take_along_axis(scales, best, axis=-2), NAN_SCALE)
        steps = mx.take_along_axis(steps, best, axis=-2)
        codes = mx.where(y >= 0, self.half + steps, self.half - 1 - steps)
        return Quantized(codes, scales, biases)

    def dequantize(self, quantized: Quantized) -> mx.array:
        """The vectors the codes stand for, still rotated, float32 [..., D]."""
        y = self.centroids(quantized.codes) * quantized.scales.astype(mx.float32)[..., None]
        if quantized.biases is None:
            return y
        return y + quantized.biases.astype(mx.float32)[..., None]

    def centroids(self, codes: mx.array) -> mx.array:
        """The centroid of each code, float32, before any scale. Codes of any type."""
        x = codes.astype(mx.float32)[..., None, None, :] - (self.half - 0.5)
        return self._polynomial(x).squeeze((-3, -2))

    def _polynomial(self, x: mx.array) -> mx.array:
        """c1 x + c3 x^3 + c5 x^5 by Horner's rule, as `Format.centroids` has it.

        Where one kind has fewer terms than another, its first steps are 0 x^2 + c: exact.
        """
        *lower, value = self.coefficients
        if not lower:
            return x * value
        square = x * x
        for coefficient in reversed(lower):
            value = square * value + coefficient
        return x * value

    def _steps(self, magnitude: mx.array, largest: mx.array) -> mx.array:
        """How many positive midpoints, times the candidate scale, are at most each magnitude.

        Shapes [..., 1, 1, D] and [..., 1, 1, 1] give whole numbers [..., 1, 5, D].
        """
        if self.midpoints is None:
            return self._divided_steps(magnitude, largest)
        steps = self._counted_steps(magnitude, largest)
        if self.any_uniform:
            steps = steps + self._divided_steps(magnitude, largest)
        return steps

    def _counted_steps(self, magnitude: mx.array, largest: mx.array) -> mx.array:
        """`_steps` by comparison with every bound; 0 in a uniform format."""
        assert self.midpoints is not None, "all formats are uniform"
        bounds = largest * self.factors * self.midpoints  # [..., M, 5, 1]
        if magnitude.size <= SMALL:
            return mx.sum(magnitude >= bounds, axis=-3, keepdims=True)
        steps = mx.zeros((1,))
        for i in range(bounds.shape[-3]):
            steps = steps + (magnitude >= bounds[..., i : i + 1, :, :])
        return steps

    def _divided_steps(self, magnitude: mx.array, largest: mx.array) -> mx.array:
        """`_steps` for the midpoints c1, 2 c1, ... of a uniform format, by division; 0 in others.

        c1 is a power of two, so width * i is scale * (c1 i).
        """
        return multiples(magnitude, largest * self.widths, self.last)


def are_finite(y: mx.array) -> mx.array:
    """Which vectors [..., D] have no coordinate that is NaN or infinite, bool [..., 1]."""
    return mx.all(y - y == 0, axis=-1, keepdims=True)


def multiples(magnitude: mx.array, width: mx.array, last: mx.array | int) -> mx.array:
    """How many of width, 2 width, ... last width, each rounded, are at most the magnitude.

    Whole numbers, float32. The quotient is taken a little too small, so that its whole part is the
    answer or 1 less.
    """
    count = mx.floor(magnitude / width * BELOW)
    count = count + (magnitude >= (count + 1) * width)
    return mx.where(magnitude < last * width, count, last)


def _sums(magnitude: mx.array, centroids: mx.array) -> tuple[mx.array, mx.array]:
    """<y, c> and <c, c> of each candidate, both [..., 1, 5, 1]."""
    if magnitude.size > SMALL:
        return tree_sum(magnitude * centroids), tree_sum(centroids * centroids)
    both = tree_sum(mx.where(IS_ENERGY, centroids, magnitude) * centroids)
    product, energy = mx.split(both, 2, axis=-3)
    return product, energy


def _middle(y: mx.array) -> mx.array:
    """(max + min) / 2 of each vector as float16, [..., 1]."""
    middle = (mx.max(y, axis=-1, keepdims=True) + mx.min(y, axis=-1, keepdims=True)) * 0.5
    return mx.clip(middle, -MAX_SCALE, MAX_SCALE).astype(mx.float16)


def _each(constants: Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> mx.array:
    """A constant of each kind, to go with [..., F, M, 5, D]; without F where all are equal."""
    stacked = np.array(constants)
    stacked = stacked.astype(bool if stacked.dtype == bool else np.float32)
    if (stacked == stacked[0]).all():
        return mx.array(stacked[0])
    shape = (1, 1, 1, *stacked.shape[1:])[-3:]
    return mx.array(stacked.reshape(-1, *shape))


def _flags(flags: Sequence[bool]) -> mx.array | None:
    """Which of the kinds; None where none is."""
    return _each(flags) if any(flags) else None


def _positive_midpoints(formats: Sequence[Format], head_size: int) -> mx.array | None:
    """Of each format, float32 [M, 1, 1], infinite where it has fewer than M.

    Those of uniform formats are not needed: all infinite. None where there are no others.
    """
    counted = [
        () if format.degree == 1 else format.midpoints(head_size)[format.num_codes // 2 :]
        for format in formats
    ]
    most = max(map(len, counted))
    padded = np.full((len(formats), most, 1, 1), np.inf, np.float32)
    for row, midpoints in zip(padded, counted, strict=True):
        row[: len(midpoints), 0, 0] = midpoints
    return _each(padded) if most else None
