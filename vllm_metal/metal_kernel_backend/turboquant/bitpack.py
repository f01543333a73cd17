"""b-bit codes <-> 16-bit halfwords: 16 codes fill exactly b halfwords, for every b from 2 to 8.

A halfword holds f = 16 // b whole codes, the first in its lowest bits, and s = 16 - f b spare bits
above them. Halfword j of a group of b holds codes j f .. j f + f - 1. That places b f of the 16
codes; the rest lie in the spare bits of the group, read as one little-endian bit string:

    bits   codes in a halfword   spare bits   codes in the spare bits of the group
    2         8                     0            none
    3         5                     1            code 15      = bit 15 of halfwords 0, 1, 2
    4         4                     0            none
    5         3                     1            code 15      = bit 15 of halfwords 0 .. 4
    6         2                     4            codes 12-15  = 4 + 2 | 2 + 4 | 4 + 2 | 2 + 4 bits
    7         2                     2            codes 14, 15 = 2 + 2 + 2 + 1 | 1 + 2 + 2 + 2 bits
    8         2                     0            none

So no code crosses from one halfword to the next except in spare bits, and widths 2, 4 and 8 are
plain little-endian packing.
"""

from functools import cache

import mlx.core as mx

GROUP = 16
"""Codes in a group."""


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., D], any integer type, to halfwords uint16 [..., D * bits / 16].

    Raises ValueError if D is not a multiple of 16.
    """
    *lead, size = codes.shape
    _check(size, GROUP, "codes")
    groups = size // GROUP
    fields, spare = divmod(GROUP, bits)
    codes = codes.astype(mx.uint32).reshape(*lead, groups, GROUP)
    whole = codes[..., : bits * fields].reshape(*lead, groups, bits, fields)
    halfwords = mx.sum(whole << _shifts(fields, bits), axis=-1)
    if spare:
        rest = codes[..., bits * fields :] << _shifts(GROUP - bits * fields, bits)
        stream = mx.sum(rest, axis=-1, keepdims=True)
        pieces = (stream >> _shifts(bits, spare)) & ((1 << spare) - 1)
        halfwords = halfwords | (pieces << (GROUP - spare))
    return halfwords.astype(mx.uint16).reshape(*lead, groups * bits)


def unpack(halfwords: mx.array, bits: int) -> mx.array:
    """Halfwords uint16 [..., D * bits / 16] to codes uint16 [..., D], the inverse of `pack`.

    Raises ValueError if the last axis is not a multiple of `bits`.
    """
    *lead, size = halfwords.shape
    _check(size, bits, "halfwords")
    groups = size // bits
    fields, spare = divmod(GROUP, bits)
    mask = (1 << bits) - 1
    halfwords = halfwords.reshape(*lead, groups, bits)
    codes = (halfwords[..., None] >> _shifts(fields, bits, mx.uint16)) & mask
    if spare:
        pieces = (halfwords >> (GROUP - spare)).astype(mx.uint32)
        stream = mx.sum(pieces << _shifts(bits, spare), axis=-1, keepdims=True)
        rest = (stream >> _shifts(GROUP - bits * fields, bits)) & mask
        codes = codes.reshape(*lead, groups, bits * fields)
        codes = mx.concatenate([codes, rest.astype(mx.uint16)], axis=-1)
    return codes.reshape(*lead, groups * GROUP)


@cache
def _shifts(count: int, step: int, dtype: mx.Dtype = mx.uint32) -> mx.array:
    """0, step, 2 step, ...; [count]."""
    return mx.array([i * step for i in range(count)], dtype)


def _check(size: int, multiple: int, what: str) -> None:
    if size % multiple:
        raise ValueError(f"{size} {what} in a vector; a multiple of {multiple} is needed")
