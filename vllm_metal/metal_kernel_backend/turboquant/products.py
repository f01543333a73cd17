"""Products with packed vectors, for the plain MLX path: few operations, no rearranging.

Field i of every halfword is taken at once, so the codes come out field by field instead of in the
vector's order. Only the small side of a product knows: the rotations of queries and outputs are
matrices here, whose columns and rows carry the order.

    fields of a 3-bit vector of 64      [5 fields, 12 halfwords], then 4 codes from spare bits
"""

from functools import cache

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.bitpack import GROUP
from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs


class PackedVectors:
    """Reads packed codes of one format and size as numbers to multiply with.

    A number x stands for the centroid `slope * x + intercept`: where the codebook is uniform the
    numbers are the codes themselves, and the product is corrected once.
    """

    def __init__(self, format: Format, head_size: int):
        self.format = format
        self.head_size = head_size
        self._fields, self._spare = divmod(GROUP, format.bits)
        self._whole = format.bits * self._fields
        self.slope, self.intercept = 1.0, 0.0
        *self._lower, self._highest = (c.item() for c in format.coefficients(head_size))
        if format.degree == 1:
            self.slope = self._highest
            self.intercept = -self.slope * (format.num_codes - 1) / 2
        shifts = np.arange(self._fields, dtype=np.uint16) * format.bits
        self._shifts = mx.array(shifts[:, None, None, None, None])
        self.order = mx.array(self._order())
        """Element of the vector at each place of a product's small side, int32 [D]."""
        self._spare_shifts = mx.arange(format.bits, dtype=mx.uint32) * self._spare

    def numbers(self, halfwords: mx.array) -> list[mx.array]:
        """uint16 [B, H, S, D * bits / 16] to float32 [F, B, H, S, D'] arrays, one or two.

        The first holds the whole codes of F fields, the second those from spare bits.
        """
        if self.format.bits == 8:
            return [self._convert(halfwords.view(mx.uint8)[None])]
        mask = self.format.num_codes - 1
        whole = self._convert((halfwords[None] >> self._shifts) & mask)
        if not self._spare:
            return [whole]
        pieces = (halfwords >> (GROUP - self._spare)).astype(mx.uint32)
        pieces = pieces.reshape(*halfwords.shape[:-1], -1, self.format.bits)
        bits = mx.sum(pieces << self._spare_shifts, axis=-1)
        codes = [(bits >> (i * self.format.bits)) & mask for i in range(GROUP - self._whole)]
        rest = mx.stack(codes, axis=-1).reshape(1, *halfwords.shape[:-1], -1)
        return [whole, self._convert(rest)]

    def products(self, queries: mx.array, halfwords: mx.array) -> mx.array:
        """Dot products of queries [B, H, G, D] with centroids [B, H, S, D]: [B, H, G, S]."""
        total = None
        start = 0
        for part in self.numbers(halfwords):
            fields, size = part.shape[0], part.shape[0] * part.shape[-1]
            query = queries[..., start : start + size]
            query = mx.moveaxis(query.reshape(*query.shape[:-1], fields, -1), -2, 0)
            product = mx.sum(_rowwise(query, part.swapaxes(-1, -2)), axis=0)
            total = product if total is None else total + product
            start += size
        if self.intercept:
            query_sum = mx.sum(queries, axis=-1, keepdims=True)
            return total * self.slope + query_sum * self.intercept
        return total

    def weighted_sum(self, weights: mx.array, halfwords: mx.array) -> mx.array:
        """Sums of centroids [B, H, S, D] under weights [B, H, G, S]: [B, H, G, D]."""
        sums = []
        for part in self.numbers(halfwords):
            fields = mx.moveaxis(_rowwise(weights[None], part), 0, -2)  # [B, H, G, F, D']
            sums.append(fields.reshape(*fields.shape[:-2], -1))
        out = sums[0] if len(sums) == 1 else mx.concatenate(sums, axis=-1)
        if self.intercept:
            weight_sum = mx.sum(weights, axis=-1, keepdims=True)
            return out * self.slope + weight_sum * self.intercept
        return out

    def centroids(self, halfwords: mx.array) -> mx.array:
        """Centroids, float32 [B, H, S, D]."""
        parts = []
        for part in self.numbers(halfwords):
            part = mx.moveaxis(part, 0, -2)
            parts.append(part.reshape(*part.shape[:-2], -1))
        numbers = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return numbers * self.slope + self.intercept if self.intercept else numbers

    def _order(self) -> np.ndarray:
        codes = np.arange(self.head_size, dtype=np.int32).reshape(-1, GROUP)
        if self.format.bits == 8:
            return codes.ravel()
        whole = codes[:, : self._whole].reshape(-1, self.format.bits, self._fields)
        fields = np.moveaxis(whole, -1, 0).ravel()
        return np.concatenate([fields, codes[:, self._whole :].ravel()])

    def _convert(self, codes: mx.array) -> mx.array:
        """Codes to numbers, float32: the codebook polynomial where it is not a straight line."""
        numbers = codes.astype(mx.float32)
        if not self._lower:
            return numbers
        x = numbers - (self.format.num_codes - 1) / 2
        square = x * x
        value = self._highest
        for coefficient in reversed(self._lower):
            value = square * value + coefficient
        return value * x


def _rowwise(rows: mx.array, matrix: mx.array) -> mx.array:
    """rows [..., G, K] @ matrix [..., K, N], one row at a time.

    A BLAS spends more on dividing so thin a product among threads than on the product.
    """
    return (rows[..., None, :] @ matrix[..., None, :, :])[..., 0, :]


def query_matrices(multiplier: np.ndarray, order: mx.array) -> mx.array:
    """Queries to rotated queries in the order of the keys: float32 [H, D, D], q' = q @ matrix.

    Args:
        multiplier: [H, D], from calibration.
        order: [D], `PackedVectors.order` of the keys.
    """
    rotation = _rotation(order.size)[:, np.array(order)]
    return mx.array((signs(order.size) / multiplier)[:, :, None] * rotation)


def output_matrix(order: mx.array) -> mx.array:
    """Sums in the order of the values to outputs: float32 [D, D], o = o' @ matrix."""
    return mx.array(_rotation(order.size)[np.array(order)] * signs(order.size))


@cache
def _rotation(head_size: int) -> np.ndarray:
    """R, float32 [D, D]; symmetric."""
    return np.array(rotate(mx.eye(head_size)))
