"""b-bit codes <-> 16-bit halfwords: 16 codes fill exactly b halfwords, for every b from 2 to 8.

A halfword holds f = 16 // b whole codes, the first in its lowest bits, and s = 16 - f b spare bits
above them. The 16 codes are a chunk. Halfword j of its b holds codes j f .. j f + f - 1. That
places b f codes; the rest lie in the spare bits of the chunk, read as one little-endian bit string:

    bits   codes in a halfword   spare bits   codes in the spare bits of the chunk
    2         8                     0            none
    3         5                     1            code 15      = bit 15 of halfwords 0, 1, 2
    4         4                     0            none
    5         3                     1            code 15      = bit 15 of halfwords 0 .. 4
    6         2                     4            codes 12-15  = 4 + 2 | 2 + 4 | 4 + 2 | 2 + 4 bits
    7         2                     2            codes 14, 15 = 2 + 2 + 2 + 1 | 1 + 2 + 2 + 2 bits
    8         2                     0            none

So no code crosses from one halfword to the next except in spare bits, and widths 2, 4 and 8 are
plain little-endian packing.

Levels are packed plainly, four to a halfword, the first in its lowest bits.

Packing is a product with a matrix of powers of two: sums of whole numbers below 2^24, which float32
holds exactly in any order. Unpacking widens each code of a word to a byte of a longer word, and
looks at that as bytes: element by element, which compiles to one pass over contiguous memory.
"""

from collections.abc import Sequence
from functools import cache
from itertools import starmap

import mlx.core as mx
import numpy as np

CHUNK = 16
"""Codes that are packed together."""

LEVEL_SHIFTS = mx.array([0, 4, 8, 12], mx.uint16)
"""Where the levels of a halfword begin."""

WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""The unsigned integer of so many bytes."""


class Packing:
    """Packs vectors that lie side by side, each with its own number of bits.

    Args:
        vectors: (size, bits) of each.

    Raises:
        ValueError: a size is not a multiple of 16.
    """

    def __init__(self, vectors: Sequence[tuple[int, int]]):
        for size, _ in vectors:
            _check(size, CHUNK, "codes")
        whole = _block_diagonal(list(starmap(_whole_powers, vectors)))
        spare = _block_diagonal(list(starmap(_spare_powers, vectors)))
        self._has_spare = bool(spare.any())
        in_one = all(bits * (CHUNK % bits) <= 24 - CHUNK for _, bits in vectors)
        self._whole = mx.array(whole + spare * 2**CHUNK if in_one else whole)
        self._spare = None if in_one else mx.array(spare)
        """What a product with it gives: the bit string of the spare bits, at each halfword of its
        chunk. None where short strings are in the first product, above the halfword."""
        pieces = np.concatenate(list(starmap(_pieces, vectors)), axis=1)
        self._begin, self._mask, self._place = (mx.array(row) for row in pieces)

    def __call__(self, codes: mx.array) -> mx.array:
        """Codes float32 [H, T, sum of sizes] to uint16 [H, T, sum of size * bits / 16]."""
        halfwords = (codes @ self._whole).astype(mx.uint32)
        if self._has_spare:
            if self._spare is None:
                string = halfwords >> CHUNK
            else:
                string = (codes @ self._spare).astype(mx.uint32)
            halfwords = halfwords | (((string >> self._begin) & self._mask) << self._place)
        return halfwords.astype(mx.uint16)


@cache
def packing(*vectors: tuple[int, int]) -> Packing:
    """The one `Packing` of these vectors: all layers share its matrices."""
    return Packing(vectors)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., D] of any type to halfwords uint16 [..., D * bits / 16].

    Raises ValueError if D is not a multiple of 16.
    """
    *lead, size = codes.shape
    codes = codes.astype(mx.float32).reshape(1, -1, size)
    return packing((size, bits))(codes).reshape(*lead, -1)


def lanes(halfwords: mx.array, bits: int) -> list[mx.array]:
    """Codes as bytes, in the order of `lane_elements`: uint8 [..., L], one or two arrays.

    The first has the whole codes of each of the halfwords uint16 [..., D * bits / 16], the second
    those in spare bits. Each halfword, or bit string, gives a power of two of bytes; those left
    over are 0.
    """
    fields, spare = divmod(CHUNK, bits)
    parts = [_widen(halfwords, fields, bits)]
    if spare:
        word = WORDS[_width(-(-spare * bits // 8))]
        pieces = [halfwords[..., i::bits] >> (CHUNK - spare) for i in range(bits)]
        string = pieces[0].astype(word)
        for i in range(1, bits):
            string = string | (pieces[i].astype(word) << (i * spare))
        parts.append(_widen(string, CHUNK - bits * fields, bits))
    return parts


def lane_elements(size: int, bits: int) -> list[np.ndarray]:
    """Which element of a vector of `size` each of its `lanes` holds; -1 where none."""
    fields, spare = divmod(CHUNK, bits)
    first = np.arange(0, size, CHUNK)[:, None, None]
    counts = [(0, bits, fields)]
    if spare:
        counts.append((bits * fields, 1, CHUNK - bits * fields))
    elements = []
    for begin, words, count in counts:
        lane = np.arange(_width(count))
        element = first + begin + count * np.arange(words)[:, None] + lane
        elements.append(np.where(lane < count, element, -1).ravel())
    return elements


def unpack(halfwords: mx.array, bits: int) -> mx.array:
    """Halfwords uint16 [..., D * bits / 16] to codes uint8 [..., D], the inverse of `pack`.

    Raises ValueError if the last axis is not a multiple of `bits`.
    """
    *lead, size = halfwords.shape
    _check(size, bits, "halfwords")
    chunks = size // bits
    whole, *spare = lanes(halfwords, bits)
    fields = CHUNK // bits
    codes = whole.reshape(*lead, size, -1)[..., :fields].reshape(*lead, chunks, bits * fields)
    if spare:
        rest = spare[0].reshape(*lead, chunks, -1)[..., : CHUNK - bits * fields]
        codes = mx.concatenate([codes, rest], axis=-1)
    return codes.reshape(*lead, chunks * CHUNK)


def pack_levels(levels: mx.array) -> mx.array:
    """4-bit levels [..., N] of any type to halfwords uint16 [..., ceil(N / 4)]; the rest is 0."""
    spare = -levels.shape[-1] % 4
    if spare:
        levels = mx.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, spare)])
    quads = levels.astype(mx.uint16).reshape(*levels.shape[:-1], -1, 4)
    return mx.sum(quads << LEVEL_SHIFTS, axis=-1).astype(mx.uint16)


def unpack_levels(halfwords: mx.array, count: int) -> mx.array:
    """Halfwords uint16 [..., ceil(N / 4)] to N = `count` levels uint16, as `pack_levels` had."""
    quads = (halfwords[..., None] >> LEVEL_SHIFTS) & 15
    return quads.reshape(*halfwords.shape[:-1], -1)[..., :count]


def _whole_powers(size: int, bits: int) -> np.ndarray:
    """What a code in a field adds to its halfword: float32 [D, D * bits / 16]."""
    fields = CHUNK // bits
    powers = np.zeros((CHUNK, bits), np.float32)
    for code in range(bits * fields):
        powers[code, code // fields] = 2.0 ** (code % fields * bits)
    return np.kron(np.eye(size // CHUNK, dtype=np.float32), powers)


def _spare_powers(size: int, bits: int) -> np.ndarray:
    """What the other codes add to the bit string of their chunk: float32 [D, D * bits / 16]."""
    first = CHUNK // bits * bits
    powers = np.zeros((CHUNK, bits), np.float32)
    for code in range(first, CHUNK):
        powers[code] = 2.0 ** ((code - first) * bits)
    return np.kron(np.eye(size // CHUNK, dtype=np.float32), powers)


def _pieces(size: int, bits: int) -> np.ndarray:
    """Each halfword's piece of the bit string: where it begins, its mask, where it goes.

    uint32 [3, D * bits / 16].
    """
    spare = CHUNK % bits
    piece = [(i * spare, (1 << spare) - 1, CHUNK - spare) for i in range(bits)]
    return np.tile(np.array(piece, np.uint32).T, size // CHUNK)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """One matrix [1, rows, columns] with these along its diagonal."""
    matrix = np.zeros((1, *np.sum([block.shape for block in blocks], axis=0)), np.float32)
    row = column = 0
    for block in blocks:
        matrix[0, row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return matrix


def _widen(words: mx.array, count: int, bits: int) -> mx.array:
    """`count` codes of each word [..., n] to bytes, uint8 [..., n * width]."""
    if bits == 8:
        return words.view(mx.uint8)
    words = words.astype(WORDS[_width(count)])
    mask = (1 << bits) - 1
    wide = words & mask
    for i in range(1, count):
        wide = wide | ((words & (mask << (i * bits))) << (i * (8 - bits)))
    return wide.view(mx.uint8)


def _width(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _check(size: int, multiple: int, what: str) -> None:
    if size % multiple:
        raise ValueError(f"{size} {what} in a vector; a multiple of {multiple} is needed")
