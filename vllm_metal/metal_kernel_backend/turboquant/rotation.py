"""The rotation of keys, queries and values before they are quantised.

A head size D = m * 2^k (m odd) is seen as m blocks of 2^k coordinates:

    R = (I_m - (2 / m) 1 1^T) (x) H / sqrt(2^k)

H is the Walsh-Hadamard matrix of a block; the first factor mixes the blocks, and is absent for
m = 1. R is orthonormal and symmetric, so it is its own inverse. It spreads every coordinate over
the vector; a fixed vector of signs before it keeps constant vectors from landing on one coordinate.

Rounding is defined, so that kernels store the same bytes: float32; butterflies (a + b, a - b) at
distances 1, 2, 4, ...; then each element times 1 / sqrt(2^k); then, for m > 1, the sum of a
coordinate over the blocks from first to last, times 2 / m, rounded, is subtracted from each.
"""

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.layout import check_head_size


def rotate(x: mx.array) -> mx.array:
    """R x over the last axis, float32 [..., D] to [..., D]. Also the inverse.

    Raises ValueError if D has no rotation.
    """
    *lead, head_size = x.shape
    power, m = block_split(head_size)
    if m == 1:
        return mx.hadamard_transform(x)
    blocks = mx.hadamard_transform(x.reshape(*lead, m, power))
    blocks = blocks - block_sum(blocks) * np.float32(2 / m).item()
    return blocks.reshape(*lead, head_size)


def tree_sum(x: mx.array) -> mx.array:
    """Sum over the last axis in a defined order, float32 [..., D] to [..., 1].

    Neighbours are added in pairs, then pairs of pairs, up to the 2^k of a block: the first output
    of an unscaled Hadamard transform. The m blocks are added from first to last.
    """
    *lead, head_size = x.shape
    power, m = block_split(head_size)
    if m == 1:
        return mx.hadamard_transform(x, scale=1.0)[..., :1]
    sums = mx.hadamard_transform(x.reshape(*lead, m, power), scale=1.0)[..., :1]
    return block_sum(sums)[..., 0, :]


def block_sum(blocks: mx.array) -> mx.array:
    """Sum over the blocks from first to last, [..., m, n] to [..., 1, n]."""
    total = blocks[..., :1, :]
    for i in range(1, blocks.shape[-2]):
        total = total + blocks[..., i : i + 1, :]
    return total


def block_split(head_size: int) -> tuple[int, int]:
    """(2^k, m) of D = m * 2^k. Raises ValueError if D has no rotation."""
    check_head_size(head_size)
    power = head_size & -head_size
    return power, head_size // power


def signs(head_size: int) -> np.ndarray:
    """The signs of every head of every layer, float32 [D] of +1 and -1.

    Sign i is bit 31 of the 32-bit finaliser of MurmurHash3 applied to (i + 1) * 0x9E3779B1.
    """
    h = (np.arange(1, head_size + 1, dtype=np.uint64) * 0x9E3779B1) & 0xFFFFFFFF
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    h ^= h >> 16
    return np.where(h >> 31, -1.0, 1.0).astype(np.float32)
