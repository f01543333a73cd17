"""Keys and values to codes and back, in plain MLX. The oracle of the kernels.

    keys      k' = R (s m (k - centre))      queries   q' = R (s q / m)      q'.k' = q.(k - centre)
    values    v' = R (s v)                   outputs   o  = s R o'

R is the rotation, s its signs; centre and m are calibrated constants of the layer and KV head. The
centre moves every logit of a query by the same amount, which softmax does not see. A rotated vector
y is stored as codes and a scale:

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
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs, tree_sum

LIMIT = 2.0**24
"""Rotated coordinates beyond it are cut: no float16 scale reaches them, and squares stay finite."""

MAX_SCALE = 65504.0
"""The largest float16."""

TINY = 1e-37
"""Added where 0 / 0 must not be."""

SMALL = 1 << 14
"""Up to this many coordinates all comparisons are made in one operation; beyond, one by one."""


@dataclass(frozen=True)
class Quantized:
    """Vectors as stored, but for the packing of their codes."""

    codes: mx.array
    """uint8 [..., D]."""
    scales: mx.array
    """float16 [...]."""
    biases: mx.array | None = None
    """float16 [...]; None unless the format has them."""


class Quantizer:
    """Rotated vectors of one format and size to codes and scales, and back."""

    def __init__(self, format: Format, head_size: int, *, unbiased: bool):
        """`unbiased` chooses the scale: true for values, false (least squares) for keys."""
        self.format = format
        self.unbiased = unbiased
        self.half = format.num_codes // 2
        self.coefficients = [c.item() for c in format.coefficients(head_size)]
        self.factors = mx.array(format.scale_factors(head_size))
        self.midpoints = mx.array(format.midpoints(head_size)[self.half :])
        """The positive midpoints, [half - 1]."""

    def quantize(self, y: mx.array) -> Quantized:
        """Rotated vectors, float32 [..., D]."""
        y = mx.clip(y, -LIMIT, LIMIT)
        biases = None
        if self.format.has_bias:
            biases = _middle(y)
            y = y - biases.astype(mx.float32)[..., None]
        magnitude = mx.abs(y)[..., None, :]
        candidates = mx.max(magnitude, axis=-1) * self.factors  # [..., 5]
        steps = self._steps(magnitude, candidates[..., None])  # [..., 5, D]
        centroids = self._polynomial(steps + 0.5)
        terms = [magnitude * centroids, centroids * centroids, magnitude * magnitude]
        sums = tree_sum(mx.concatenate(terms[: 2 + self.unbiased], axis=-2))
        count = self.factors.size
        along, energy = sums[..., :count], sums[..., count : 2 * count]  # <y, c> and <c, c>
        best = mx.argmax(along * along / energy, axis=-1, keepdims=True)
        if self.unbiased:
            scales = sums[..., 2 * count :] / mx.where(along > 0, along, 1.0)
        else:
            scales = along / energy
        scales = mx.take_along_axis(scales, best, axis=-1)[..., 0]
        steps = mx.take_along_axis(steps, best[..., None], axis=-2)[..., 0, :]
        codes = mx.where(y >= 0, self.half + steps, self.half - 1 - steps).astype(mx.uint8)
        return Quantized(codes, mx.minimum(scales, MAX_SCALE).astype(mx.float16), biases)

    def dequantize(self, quantized: Quantized) -> mx.array:
        """The vectors the codes stand for, still rotated, float32 [..., D]."""
        y = self.centroids(quantized.codes) * quantized.scales.astype(mx.float32)[..., None]
        if quantized.biases is None:
            return y
        return y + quantized.biases.astype(mx.float32)[..., None]

    def centroids(self, codes: mx.array) -> mx.array:
        """The centroid of each code, float32, before any scale. Codes of any integer type."""
        return self._polynomial(codes.astype(mx.float32) - (self.half - 0.5))

    def _polynomial(self, x: mx.array) -> mx.array:
        """c1 x + c3 x^3 + c5 x^5 by Horner's rule, as `Format.centroids` has it."""
        *lower, value = self.coefficients
        if not lower:
            return x * value
        square = x * x
        for coefficient in reversed(lower):
            value = square * value + coefficient
        return x * value

    def _steps(self, magnitude: mx.array, scales: mx.array) -> mx.array:
        """How many positive midpoints, times the scale, are at most each magnitude; float32.

        Shapes [..., 1, D] and [..., 5, 1] give [..., 5, D].
        """
        if self.format.degree == 1:
            return self._uniform_steps(magnitude, scales)
        bounds = scales * self.midpoints  # [..., 5, half - 1]
        if magnitude.size <= SMALL:
            return mx.sum(magnitude[..., None] >= bounds[..., None, :], axis=-1).astype(mx.float32)
        steps = mx.zeros((1,))
        for i in range(self.half - 1):
            steps = steps + (magnitude >= bounds[..., i : i + 1])
        return steps

    def _uniform_steps(self, magnitude: mx.array, scales: mx.array) -> mx.array:
        """`_steps` for the midpoints c1, 2 c1, ...: divide, then correct the rounding both ways.

        c1 is a power of two, so width * i is scale * (c1 i). A width of 0 gives the last step.
        """
        width = scales * self.coefficients[0]
        last = float(self.half - 1)
        steps = mx.minimum(mx.floor((magnitude + TINY) / width), last)
        steps = steps - (magnitude < steps * width)
        return mx.minimum(steps + (magnitude >= (steps + 1) * width), last)


class KeyCodec:
    """Keys of one layer: [..., H, D] in any float type."""

    def __init__(self, format: Format, centre: np.ndarray, multiplier: np.ndarray):
        """`centre` and `multiplier` are float32 [H, D], from `calibration`."""
        head_size = centre.shape[-1]
        self.quantizer = Quantizer(format, head_size, unbiased=False)
        self.centre = mx.array(centre)
        self.key_factors = mx.array(signs(head_size) * multiplier)
        """s m: what a centred key is multiplied by, [H, D]."""
        self.query_factors = mx.array(signs(head_size) / multiplier)
        """s / m: what a query is multiplied by, [H, D]."""
        self.rotated_centre = rotate(self.centre * self.key_factors)
        """What the centre becomes, [H, D]. Scores of q' with k' + rotated_centre are those of
        uncentred keys: what attention sinks, logits without a key, are compared with."""

    def rotate_keys(self, keys: mx.array) -> mx.array:
        """Keys [..., H, D] to k', float32."""
        return rotate((keys.astype(mx.float32) - self.centre) * self.key_factors)

    def rotate_queries(self, queries: mx.array) -> mx.array:
        """Queries [..., Hq, D] to q', float32. Query head i reads KV head i // (Hq / H)."""
        *lead, query_heads, head_size = queries.shape
        num_kv_heads = self.query_factors.shape[0]
        grouped = queries.astype(mx.float32).reshape(*lead, num_kv_heads, -1, head_size)
        rotated = rotate(grouped * self.query_factors[:, None, :])
        return rotated.reshape(*lead, query_heads, head_size)

    def quantize(self, keys: mx.array) -> Quantized:
        """Keys [..., H, D] to codes and scales."""
        return self.quantizer.quantize(self.rotate_keys(keys))

    def dequantize(self, quantized: Quantized) -> mx.array:
        """Stored keys as the model's own keys, [..., H, D]."""
        return rotate(self.quantizer.dequantize(quantized)) * self.query_factors + self.centre


class ValueCodec:
    """Values of any layer: [..., D] in any float type."""

    def __init__(self, format: Format, head_size: int):
        self.quantizer = Quantizer(format, head_size, unbiased=True)
        self.factors = mx.array(signs(head_size))
        """s, [D]."""

    def rotate_values(self, values: mx.array) -> mx.array:
        """Values [..., D] to v', float32."""
        return rotate(values.astype(mx.float32) * self.factors)

    def unrotate_outputs(self, outputs: mx.array) -> mx.array:
        """Weighted sums of v', [..., D], to sums of values. Linear, so once after merging."""
        return rotate(outputs) * self.factors

    def quantize(self, values: mx.array) -> Quantized:
        """Values [..., D] to codes and scales."""
        return self.quantizer.quantize(self.rotate_values(values))

    def dequantize(self, quantized: Quantized) -> mx.array:
        """Stored values as the model's own values, [..., D]."""
        return self.unrotate_outputs(self.quantizer.dequantize(quantized))


def _middle(y: mx.array) -> mx.array:
    """(max + min) / 2 of each vector as float16, [...]."""
    middle = (mx.max(y, axis=-1) + mx.min(y, axis=-1)) * 0.5
    return mx.clip(middle, -MAX_SCALE, MAX_SCALE).astype(mx.float16)
