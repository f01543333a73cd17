"""Metadata of every group, written out by hand."""

import numpy as np

from vllm_metal.kv_cache.group_metadata import (
    decode_metadata,
    gathered_tokens,
    prefill_metadata,
)
from vllm_metal.kv_cache.groups import AttentionGroup, StateGroup

FULL = AttentionGroup(8, layers=(0,))
WINDOW = AttentionGroup(4, layers=(1,), sliding_window=6)
STATES = StateGroup((0,), 100)
GROUPS = (FULL, WINDOW, STATES)
TABLE = np.arange(20, 28, dtype=np.int32)
"""Of a window group: blocks of 4 tokens at positions 0, 4, 8, ..."""


def test_tokens_gathered_of_a_request_are_those_of_the_layer_that_reads_most():
    assert gathered_tokens([FULL], 17) == 3 * 8
    assert gathered_tokens([FULL], 8 * 17) == 18 * 8  # as graphs round
    assert gathered_tokens([WINDOW], 1000) == 3 * 4  # 6 tokens that begin at the end of a block
    assert gathered_tokens([WINDOW], 3) == 4
    assert gathered_tokens(GROUPS, 17) == 3 * 8
    assert gathered_tokens([STATES], 17) == 0


def test_decode_of_a_window_begins_at_the_first_block_that_it_touches():
    tables = [
        np.array([[1, 2, 3], [4, 5, 6]], np.int32),
        np.stack([TABLE, TABLE + 20]),
        np.array([[9], [8]], np.int32),
    ]
    full, window, states = decode_metadata(GROUPS, tables, np.array([17, 3], np.int32))
    assert full.block_table.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert full.seq_lens.tolist() == [18, 4]
    assert full.slot_mapping.tolist() == [3 * 8 + 1, 4 * 8 + 3]
    # 18 tokens, of which 12 .. 17 are seen: from block 3 on; 4 tokens, all seen
    assert window.block_table.tolist() == [[23, 24], [40, 41]]
    assert window.seq_lens.tolist() == [18 - 12, 4]
    assert window.max_seq_len == 6
    assert window.slot_mapping.tolist() == [24 * 4 + 1, 40 * 4 + 3]
    assert full.offset.tolist() == window.offset.tolist() == [17, 3]
    assert states.read_ids.tolist() == states.write_ids.tolist() == [9, 8]
    assert not states.begins


def test_work_in_a_window_does_not_grow_with_the_request():
    group = AttentionGroup(4, layers=(0,), sliding_window=6)
    table = np.arange(1, 1001, dtype=np.int32)[None]
    widths = set()
    for position in range(100, 3900, 37):
        [metadata] = decode_metadata([group], [table], np.array([position], np.int32))
        widths.add(metadata.block_table.shape[1])
        assert metadata.offset == position
        first = int(metadata.block_table[0, 0]) - 1
        assert first * 4 <= position + 1 - 6 < (first + 1) * 4
        assert first * 4 + int(metadata.seq_lens[0]) == position + 1
    assert widths == {2, 3}


def test_a_chunk_in_a_window_keeps_what_its_first_token_sees():
    tables = [np.array([1, 2, 3], np.int32), TABLE, np.array([9], np.int32)]
    full, window, states = prefill_metadata(GROUPS, tables, start=14, query_len=5)
    assert (full.context_len, full.skipped, full.offset) == (14, 0, 14)
    assert full.block_table.tolist() == [[1, 2, 3]]
    # token 14 sees 9 .. 14: from block 2 on
    assert window.block_table.tolist() == [[22, 23, 24]]
    assert (window.context_len, window.skipped, window.offset) == (14 - 8, 8, 14)
    assert window.slot_mapping.tolist() == [23 * 4 + 2, 23 * 4 + 3, 24 * 4, 24 * 4 + 1, 24 * 4 + 2]
    assert not states.begins
    assert prefill_metadata(GROUPS, tables, 0, 5)[2].begins


KEPT = StateGroup((0,), block_size=8, blocks_held=2)
KEPT_TABLE = np.array([0, 0, 7, 13], np.int32)
"""States after 24 tokens, and the newest of up to 32; the first two are not kept."""


def test_a_chunk_reads_the_state_before_it_and_writes_the_one_at_its_end():
    for start, query_len, read, write in [
        (24, 8, 7, 13),  # after a kept state, which stays
        (24, 1, 7, 13),
        (26, 3, 13, 13),
        (23, 1, 7, 7),  # that completes the block
        (16, 9, 0, 13),
    ]:
        [states] = prefill_metadata([KEPT], [KEPT_TABLE], start, query_len)
        assert (states.read_ids.tolist(), states.write_ids.tolist()) == ([read], [write])
        assert not states.begins
    [states] = prefill_metadata([KEPT], [KEPT_TABLE], 0, 24)
    assert states.begins and states.write_ids.tolist() == [7]


def test_each_row_of_a_decode_reads_and_writes_states_of_its_own():
    table = np.stack([KEPT_TABLE, np.array([4, 5, 0, 0], np.int32)])
    [states] = decode_metadata([KEPT], [table], np.array([24, 8], np.int32))
    assert (states.read_ids.tolist(), states.write_ids.tolist()) == ([7, 4], [13, 5])
    [states] = decode_metadata([KEPT], [table], np.array([25, 15], np.int32))
    assert states.read_ids is states.write_ids and states.read_ids.tolist() == [13, 5]
