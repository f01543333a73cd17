"""Slots: the places of tokens in the pages of a layer.

    slot = block_id * block_size + offset

The block id comes from the request's block table, the offset is the token's position within the
block. A slot is composed and taken apart here, and in the kernels (`kernels/turboquant.metal`).

Letters: B requests, L tokens of each, N blocks of a block table, T slots.
"""

import mlx.core as mx
import numpy as np


def compose_slots(
    block_tables: np.ndarray,  # [B, N] int32
    positions: np.ndarray,  # [B, L], each below N * block_size
    block_size: int,
) -> np.ndarray:  # [B, L] int32
    """The slots of the tokens at these positions of B requests."""
    block_ids = np.take_along_axis(block_tables, positions // block_size, axis=1)
    return (block_ids * block_size + positions % block_size).astype(np.int32)


def split_slots(
    slots: mx.array,  # [T] int32
    block_size: int,
) -> tuple[mx.array, mx.array]:
    """Block ids and offsets, both [T] int32."""
    return slots // block_size, slots % block_size
