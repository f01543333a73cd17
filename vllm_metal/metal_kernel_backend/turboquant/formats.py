"""The formats a key or a value vector can be stored in.

A stored vector is `codes` (b bits each), one float16 `scale` and, in the affine formats, one
float16 `bias`. It stands for

    scale * centroid(code) (+ bias)        centroid(code) = c1 x + c3 x^3 + c5 x^5
                                           x = code - (2^b - 1) / 2

so a codebook is an odd polynomial of the code: symmetric, without a table, never zero. Degree 1 is
a uniform grid over (-4, 4). Otherwise the coefficients are the least-squares fit to the Lloyd-Max
quantiser of one coordinate of a rotated vector of norm sqrt(head_size), whose density is
(1 - t^2)^((D - 3) / 2) with t = coordinate / sqrt(D). They are integrals, not samples, and so the
same everywhere.

One scale for a long vector leaves much to gain. From `GROUPED_HEAD_SIZE` on, keys of 4 and more
bits have a uniform grid, and beside the scale a 4-bit `level` for each `GROUP_SIZE` coordinates:

    scale * (LEVEL_BASE + level) * LEVEL_UNIT * centroid(code)

No MLX here: the planner and the command line read this file too.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

DEGREE = {2: 3, 3: 3, 4: 5, 5: 5, 6: 3, 8: 1}
"""Degree of the codebook polynomial for each number of bits. Higher degrees come closer to
Lloyd-Max (3 bits +0.2 %, 4 bits +0.2 %), but the searched scale leaves nothing of that gain."""

SCALE_FACTORS = {
    2: (0.43, 0.50, 0.57, 0.64, 0.72),
    3: (0.62, 0.69, 0.76, 0.82, 0.91),
    4: (0.83, 0.88, 0.92, 0.97, 1.01),
    5: (0.94, 0.97, 0.99, 1.01, 1.03),
    6: (0.98, 0.995, 1.01, 1.05, 1.11),
    8: (0.998, 1.001, 1.008, 1.014, 1.023),
}
"""Candidate scales, as fractions of the scale at which the outermost centroid meets the largest
coordinate: the five that serve rotated vectors of 64 to 256 coordinates best. 36 candidates would
give 0.2 % to 1.3 % less error (8 bits: 4 %)."""

GROUPED_HEAD_SIZE = 128
"""Keys of so many coordinates have levels. At 64 the scale alone is 1/4 bit a coordinate, and
levels would be as much again."""

GROUP_SIZE = 16
"""Coordinates that share a level."""

NUM_LEVELS = 16
LEVEL_BASE = 12
LEVEL_UNIT = 1 / 32

LEVEL_SCALE_FACTORS = (1.04, 1.06, 1.08, 1.10, 1.12)
"""Candidate scales with levels, as fractions of the scale at which the grid of the highest level
ends at the largest coordinate. Above 1, so that the group that holds it has levels to try."""


@dataclass(frozen=True)
class Format:
    """How one vector is stored."""

    name: str
    bits: int
    """Bits of a code, 2 to 8."""
    degree: int
    """Degree of the codebook polynomial: 1 (uniform), 3 or 5."""
    has_bias: bool = False
    """Affine: a float16 bias (the middle of the grid) is stored beside the scale."""
    grouped: bool = False
    """From GROUPED_HEAD_SIZE on: degree 1, and levels beside the scale."""

    @property
    def num_codes(self) -> int:
        return 1 << self.bits

    def has_levels(self, head_size: int) -> bool:
        """Whether vectors of this size have a level for each GROUP_SIZE coordinates."""
        return self.grouped and head_size >= GROUPED_HEAD_SIZE

    def num_terms(self, head_size: int) -> int:
        """Coefficients of the codebook polynomial: c1, c3, c5."""
        return 1 if self.has_levels(head_size) else (self.degree + 1) // 2

    def levels_bytes(self, head_size: int) -> int:
        """Bytes of the levels of one vector: whole halfwords of four."""
        return -(-head_size // (4 * GROUP_SIZE)) * 2 if self.has_levels(head_size) else 0

    def metadata_bytes(self, head_size: int) -> int:
        """Bytes of the scale and, where there are any, the levels and the bias."""
        return 2 + self.levels_bytes(head_size) + (2 if self.has_bias else 0)

    def codes_bytes(self, head_size: int) -> int:
        """Bytes of the codes of one vector."""
        return head_size * self.bits // 8

    def vector_bytes(self, head_size: int) -> int:
        """Bytes of one stored vector, metadata included."""
        return self.codes_bytes(head_size) + self.metadata_bytes(head_size)

    def bits_per_element(self, head_size: int) -> float:
        """Stored bits per coordinate, metadata included."""
        return 8 * self.vector_bytes(head_size) / head_size

    def coefficients(self, head_size: int) -> np.ndarray:
        """The codebook polynomial (c1, c3, c5), float32 [num_terms]."""
        if self.num_terms(head_size) == 1:
            return np.array([8.0 / self.num_codes], np.float32)
        return _fit(self.bits, self.degree, head_size).astype(np.float32)

    def centroids(self, head_size: int) -> np.ndarray:
        """The codebook, float32 [num_codes], increasing and antisymmetric.

        Horner's rule in x^2, each operation rounded to float32, times x last.
        """
        x = np.arange(self.num_codes, dtype=np.float32) - np.float32((self.num_codes - 1) / 2)
        *lower, value = self.coefficients(head_size)
        for coefficient in reversed(lower):
            value = value * (x * x) + coefficient
        return x * value

    def midpoints(self, head_size: int) -> np.ndarray:
        """Decision bounds, float32 [num_codes - 1]: code(u) = the number of midpoints <= u."""
        centroids = self.centroids(head_size).astype(np.float64)
        return ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)

    def scale_factors(self, head_size: int) -> np.ndarray:
        """Candidate scales of a vector whose largest magnitude is 1, float32 [5]."""
        if self.has_levels(head_size):
            highest = (LEVEL_BASE + NUM_LEVELS - 1) * LEVEL_UNIT * 4
            return (np.array(LEVEL_SCALE_FACTORS) / highest).astype(np.float32)
        factors = np.array(SCALE_FACTORS[self.bits])
        return (factors / self.centroids(head_size)[-1]).astype(np.float32)


def _odd_powers(bits: int, degree: int) -> np.ndarray:
    """x, x^3, x^5 of every code, float64 [num_codes, num_terms]."""
    x = np.arange(1 << bits) - ((1 << bits) - 1) / 2
    return x[:, None] ** np.arange(1, degree + 1, 2)


@cache
def _marginal(head_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One coordinate of a random vector of norm sqrt(head_size).

    Returns edges of a fine grid, and the probability and the first moment to the left of each.
    """
    edges = np.linspace(-1.0, 1.0, 1 << 17)
    density = (1 - ((edges[1:] + edges[:-1]) / 2) ** 2) ** ((head_size - 3) / 2)
    probability = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
    edges = edges * np.sqrt(head_size)
    moment = np.cumsum((edges[1:] + edges[:-1]) / 2 * np.diff(probability))
    return edges, probability, np.concatenate([[0.0], moment])


@cache
def _fit(bits: int, degree: int, head_size: int) -> np.ndarray:
    """Lloyd's iteration with the codebook kept an odd polynomial of the code.

    Each round bounds the cells by the midpoints and fits the polynomial to the cells' means,
    weighted by their probabilities. Returns the coefficients, float64 [num_terms].
    """
    edges, probability, moment = _marginal(head_size)
    powers = _odd_powers(bits, degree)
    half = float(1 << (bits - 1))
    powers = powers / half ** np.arange(1, degree + 1, 2)
    # Start from the companding that is optimal for many codes (Panter and Dite).
    compander = np.concatenate([[0.0], np.cumsum(np.cbrt(np.diff(probability)))])
    ranks = (np.arange(1 << bits) + 0.5) / (1 << bits)
    centroids = np.interp(ranks, compander / compander[-1], edges)
    previous = np.zeros(powers.shape[1])
    for _ in range(10_000):
        bounds = np.concatenate([edges[:1], (centroids[1:] + centroids[:-1]) / 2, edges[-1:]])
        weight = np.diff(np.interp(bounds, edges, probability))
        target = np.diff(np.interp(bounds, edges, moment))
        fitted = np.linalg.solve(powers.T @ (powers * weight[:, None]), powers.T @ target)
        centroids = powers @ fitted
        if np.abs(fitted - previous).max() < 1e-10:
            break
        previous = fitted
    return fitted / half ** np.arange(1, degree + 1, 2)


_LLOYD_MAX = [Format(f"q{bits}_0", bits, degree) for bits, degree in DEGREE.items()]
_GROUPED = [replace(format, grouped=format.bits >= 4) for format in _LLOYD_MAX]
_UNIFORM = [Format(f"int{bits}", bits, 1) for bits in (2, 4, 8)]
_AFFINE = [Format(f"uint{bits}", bits, 1, has_bias=True) for bits in (2, 4, 8)]

KEY_FORMATS = {format.name: format for format in (*_GROUPED, *_UNIFORM, *_AFFINE)}
VALUE_FORMATS = {format.name: format for format in _LLOYD_MAX}


def key_format(name: str) -> Format:
    """The key format of this name. Raises ValueError, with the allowed names, for any other."""
    return _named("k_quant", name, KEY_FORMATS)


def value_format(name: str) -> Format:
    """The value format of this name. Raises ValueError, with the allowed names, for any other."""
    return _named("v_quant", name, VALUE_FORMATS)


class FormatPair(NamedTuple):
    """The formats of a layer's keys and values; as text `q8_0/q3_0`."""

    key: Format
    value: Format

    def slot_size(self, key_head_size: int, value_head_size: int) -> int:
        """Bytes of one KV head of one token, key and value together."""
        return self.key.vector_bytes(key_head_size) + self.value.vector_bytes(value_head_size)

    def __str__(self) -> str:
        return f"{self.key.name}/{self.value.name}"


def parse_pair(text: str) -> FormatPair:
    """The formats that `q8_0/q3_0` names. Raises ValueError for anything else."""
    k_quant, slash, v_quant = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} is not KEYS/VALUES, e.g. q8_0/q3_0")
    return FormatPair(key_format(k_quant), value_format(v_quant))


def _named(option: str, name: str, formats: dict[str, Format]) -> Format:
    if name not in formats:
        raise ValueError(f"{option} is {name!r}; allowed: {', '.join(formats)}")
    return formats[name]
