"""Slots are composed and taken apart by one rule, written out here by hand."""

import mlx.core as mx
import numpy as np

from vllm_metal.attention.slots import compose_slots, split_slots

TABLES = np.array([[7, 2, 9], [4, 5, 0]], np.int32)


def test_slots_of_rows_of_one_token():
    slots = compose_slots(TABLES, np.array([[17], [3]], np.int32), 8)
    assert slots.tolist() == [[9 * 8 + 1], [4 * 8 + 3]]
    assert slots.dtype == np.int32


def test_slots_of_a_chunk_over_the_edge_of_a_block():
    slots = compose_slots(TABLES[:1], np.arange(6, 10)[None], 8)
    assert slots.tolist() == [[7 * 8 + 6, 7 * 8 + 7, 2 * 8, 2 * 8 + 1]]


def test_a_slot_is_taken_apart_as_it_was_composed():
    positions = np.arange(24)[None]
    slots = compose_slots(TABLES[:1], positions, 8)[0]
    blocks, offsets = split_slots(mx.array(slots), 8)
    assert blocks.tolist() == [7] * 8 + [2] * 8 + [9] * 8
    assert offsets.tolist() == [*range(8)] * 3
