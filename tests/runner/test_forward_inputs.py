"""Token ids, slots and lengths of a forward pass, written out by hand."""

import mlx.core as mx
import pytest

from tests.scheduler_outputs import Continued, new_request, scheduler_output
from vllm_metal.kv_cache.groups import AttentionGroup, StateGroup
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner import forward_inputs
from vllm_metal.runner.request_batch import PLACEHOLDER, RequestBatch
from vllm_metal.runner.segments import Kind, Segment

BLOCK = 8
GROUPS = [AttentionGroup(BLOCK, layers=(0, 1))]


@pytest.fixture
def batch(make_config) -> RequestBatch:
    """Prompts of 7, 16 and 2 tokens, each with one output token; blocks in no order."""
    batch = RequestBatch(make_config(block_size=BLOCK), [BlockTableSize(BLOCK, 16)])
    new = [
        new_request("a", range(10, 17), [3]),
        new_request("b", range(20, 36), [9, 4]),
        new_request("c", [50, 51], [7]),
    ]
    batch.update(scheduler_output(new))
    for name, token in (("a", 70), ("b", 71), ("c", 72)):
        batch.append(name, token)
    batch.update(
        scheduler_output(
            continued=[
                Continued("a", 7, 1),
                Continued("b", 16, 1, new_blocks=[6]),
                Continued("c", 2, 1),
            ]
        )
    )
    return batch


def decode(batch: RequestBatch, rows: list[int], pending=None):
    firsts = [int(batch.rows.num_computed_tokens_cpu[row]) for row in rows]
    segments = [
        Segment(batch.rows.req_ids[row], row, first, 1, Kind.DECODE)
        for row, first in zip(rows, firsts, strict=True)
    ]
    token_ids, [metadata] = forward_inputs.decode_inputs(batch.rows, segments, GROUPS, pending)
    return token_ids, metadata


def test_decode_inputs(batch):
    token_ids, metadata = decode(batch, [0, 1, 2])
    assert token_ids.tolist() == [[70], [71], [72]]
    assert metadata.slot_mapping.tolist() == [3 * 8 + 7, 6 * 8 + 0, 7 * 8 + 2]
    assert metadata.seq_lens.tolist() == [8, 17, 3]
    assert metadata.offset.tolist() == [7, 16, 2]
    assert metadata.max_seq_len == 17
    assert metadata.block_table.tolist() == [[3, 0, 0], [9, 4, 6], [7, 0, 0]]
    arrays = token_ids, metadata.slot_mapping, metadata.seq_lens, metadata.offset
    assert {array.dtype for array in (*arrays, metadata.block_table)} == {mx.int32}


def test_the_block_table_is_as_wide_as_the_longest_request(batch):
    token_ids, metadata = decode(batch, [2, 0])
    assert token_ids.tolist() == [[72], [70]]
    assert metadata.block_table.tolist() == [[7], [3]]
    assert metadata.max_seq_len == 8


def test_one_request_has_a_plain_offset(batch):
    """Models that take no array of offsets decode so."""
    _, metadata = decode(batch, [1])
    assert metadata.offset == 16 and isinstance(metadata.offset, int)


def test_pending_tokens_are_used_lazily(batch):
    """Whatever order the rows had in the last step, and whichever of them go on."""
    pending = mx.array([80, 81, 82], mx.int32)
    for row in range(3):
        batch.rows.token_ids_cpu[row, batch.rows.num_computed_tokens_cpu[row]] = PLACEHOLDER
    token_ids, _ = decode(batch, [0, 1, 2], (pending, {"a": 0, "b": 1, "c": 2}))
    assert token_ids.tolist() == [[80], [81], [82]]
    other_order = {"c": 0, "b": 1, "a": 2}
    token_ids, _ = decode(batch, [0, 1, 2], (pending, other_order))
    assert token_ids.tolist() == [[82], [81], [80]]
    token_ids, _ = decode(batch, [0, 2], (pending, other_order))
    assert token_ids.tolist() == [[82], [80]]


def test_rows_that_are_not_pending_keep_their_token(batch):
    pending = mx.array([81], mx.int32)
    token_ids, _ = decode(batch, [0, 1, 2], (pending, {"b": 0}))
    assert token_ids.tolist() == [[70], [81], [72]]
    token_ids, _ = decode(batch, [1], (pending, {"b": 0}))
    assert token_ids.tolist() == [[81]]


def prefill(batch: RequestBatch, name: str, computed: int, query_len: int):
    row = batch.rows.req_id_to_index[name]
    batch.rows.num_computed_tokens_cpu[row] = computed
    token_ids, [metadata] = forward_inputs.prefill_inputs(batch.rows, row, query_len, GROUPS)
    return token_ids, metadata


def test_prefill_of_a_whole_prompt(batch):
    token_ids, metadata = prefill(batch, "b", 0, 16)
    assert token_ids.tolist() == [list(range(20, 36))]
    assert metadata.slot_mapping.tolist() == [*range(72, 80), *range(32, 40)]
    assert metadata.block_table.tolist() == [[9, 4]]
    assert (metadata.context_len, metadata.query_len, metadata.seq_len) == (0, 16, 16)
    assert {a.dtype for a in (token_ids, metadata.slot_mapping, metadata.block_table)} == {mx.int32}


def test_prefill_of_a_later_chunk(batch):
    """It begins inside a block; the table covers context and chunk, and no more."""
    token_ids, metadata = prefill(batch, "b", 5, 6)
    assert token_ids.tolist() == [list(range(25, 31))]
    assert metadata.slot_mapping.tolist() == [77, 78, 79, 32, 33, 34]
    assert metadata.block_table.tolist() == [[9, 4]]
    assert metadata.offset == 5
    assert prefill(batch, "b", 2, 6)[1].block_table.tolist() == [[9]]


def split(groups, most_tokens: int, most_rows: int = 64, drafts: int = 0) -> list[list[int]]:
    """Rows by forward pass, of requests of 8, 17 and 3 tokens: three tables of three blocks of 8.

    The request of 17 tokens has `drafts` behind them.
    """
    segments = [
        Segment(name, row, length - 1, 1, Kind.DECODE)
        for row, (name, length) in enumerate(zip("abc", (8, 17, 3), strict=True))
    ]
    segments[1] = segments[1]._replace(length=1 + drafts, drafts=(9,) * drafts)
    parts = forward_inputs.split_decode(segments, groups, most_tokens, most_rows)
    return [[segment.row for segment in part] for part in parts]


def test_decode_runs_as_one_forward_where_memory_allows():
    assert split(GROUPS, 9 * BLOCK) == [[0, 1, 2]]


def test_decode_is_cut_so_that_requests_of_like_length_run_together():
    assert split(GROUPS, 9 * BLOCK - 1) == [[0, 1], [2]]
    assert split(GROUPS, 3 * BLOCK) == [[1], [0, 2]]


def test_a_request_that_is_too_long_runs_alone():
    assert split(GROUPS, 1) == [[1], [0], [2]]


def test_each_draft_is_a_row():
    """Requests with as many drafts are neighbours, those with none come first."""
    assert split(GROUPS, 5 * 3 * BLOCK, drafts=2) == [[0, 2, 1]]
    assert split(GROUPS, 5 * 3 * BLOCK - 1, drafts=2) == [[0, 1], [2]]
    assert split(GROUPS, 1 << 20, most_rows=4, drafts=2) == [[0, 1], [2]]
    assert split(GROUPS, 1 << 20, most_rows=2, drafts=2) == [[1], [0, 2]]


def test_recurrent_states_gather_no_tokens():
    assert split([StateGroup((0,), 1 << 20)], 1) == [[0, 1, 2]]


def test_drafts_follow_the_newest_token(batch):
    """As rows of the request at the positions after it; the batch itself does not hold them."""
    segments = [
        Segment("c", 2, 2, 1, Kind.DECODE),
        Segment("b", 1, 16, 3, Kind.DECODE, drafts=(90, 91)),
    ]
    token_ids, [metadata] = forward_inputs.decode_inputs(batch.rows, segments, GROUPS, None)
    assert token_ids.tolist() == [[72], [71], [90], [91]]
    assert metadata.offset.tolist() == [2, 16, 17, 18]
    assert metadata.slot_mapping.tolist() == [7 * 8 + 2, 6 * 8, 6 * 8 + 1, 6 * 8 + 2]
    assert metadata.seq_lens.tolist() == [3, 19]
    assert metadata.block_table.tolist() == [[7, 0, 0], [9, 4, 6]]
    assert metadata.query_lens == (1, 3)
