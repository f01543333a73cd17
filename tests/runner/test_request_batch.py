"""The batch follows the scheduler, through joins, ends, preemption and late tokens."""

import pytest
import torch

from tests.scheduler_outputs import Continued, new_request, scheduler_output
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner.request_batch import PLACEHOLDER, RequestBatch
from vllm_metal.runner.segments import Kind, Segment

BLOCK = 16


@pytest.fixture
def batch(make_config) -> RequestBatch:
    return RequestBatch(make_config(), [BlockTableSize(BLOCK, 8)])


def token_ids(batch: RequestBatch, name: str) -> list[int]:
    row = batch.rows.req_id_to_index[name]
    return batch.rows.token_ids_cpu[row, : batch.rows.num_tokens_no_spec[row]].tolist()


def blocks(batch: RequestBatch, name: str) -> list[int]:
    table, row = batch.rows.block_table[0], batch.rows.req_id_to_index[name]
    return table.block_table.np[row, : table.num_blocks_per_row[row]].tolist()


def start(batch: RequestBatch) -> None:
    """Two requests with prompts of 20 and 3 tokens that have just been computed and sampled."""
    batch.update(
        scheduler_output([new_request("a", range(20), [5, 2]), new_request("b", [7, 8, 9], [4])])
    )
    batch.append("a", 30)
    batch.append("b", 31)


def test_new_requests(batch):
    start(batch)
    assert token_ids(batch, "a") == [*range(20), 30]
    assert token_ids(batch, "b") == [7, 8, 9, 31]
    assert (blocks(batch, "a"), blocks(batch, "b")) == ([5, 2], [4])


def test_a_request_samples_once_its_last_known_token_is_computed(batch):
    batch.update(scheduler_output([new_request("a", range(20), [5, 2])], num_scheduled={"a": 16}))
    assert not batch.is_complete("a", 16)
    batch.update(scheduler_output(continued=[Continued("a", 16, num_scheduled=4)]))
    assert not batch.is_complete("a", 3)
    assert batch.is_complete("a", 4)


def test_a_prefix_cache_hit_counts_as_computed(batch):
    batch.update(scheduler_output([new_request("a", range(20), [5, 2], num_computed_tokens=16)]))
    assert batch.rows.num_computed_tokens_cpu[0] == 16
    assert batch.is_complete("a", 4)


def test_blocks_are_added_as_a_request_grows(batch):
    start(batch)
    batch.update(
        scheduler_output(continued=[Continued("a", 20, 1), Continued("b", 3, 1, new_blocks=[6])])
    )
    assert (blocks(batch, "a"), blocks(batch, "b")) == ([5, 2], [4, 6])
    assert batch.requests["b"].block_ids == ([4, 6],)
    assert batch.rows.num_computed_tokens_cpu.tolist()[:2] == [20, 3]


def test_a_finished_request_is_forgotten_and_rows_close_up(batch):
    start(batch)
    batch.update(scheduler_output(continued=[Continued("b", 3, 1)], finished=["a"]))
    assert batch.rows.req_ids == ["b"]
    assert set(batch.requests) == {"b"}
    assert token_ids(batch, "b") == [7, 8, 9, 31]


def test_a_name_may_end_and_begin_in_one_step(batch):
    start(batch)
    batch.update(
        scheduler_output([new_request("a", [1, 2], [9])], [Continued("b", 3, 1)], finished=["a"])
    )
    assert token_ids(batch, "a") == [1, 2]
    assert blocks(batch, "a") == [9]
    assert batch.requests["a"].output_token_ids == []


def test_a_preempted_request_leaves_the_rows_and_comes_back_elsewhere(batch):
    """Its blocks are replaced, and its outputs kept."""
    start(batch)
    batch.update(scheduler_output(continued=[Continued("b", 3, 1)]))
    assert batch.rows.req_ids == ["b"]
    assert batch.requests["a"].output_token_ids == [30]
    back = Continued(
        "a",
        0,
        1,
        new_blocks=[11, 12],
        resumed=True,
        all_token_ids=[*range(20), 30],
        num_scheduled=21,
    )
    batch.update(scheduler_output(continued=[Continued("b", 4, 2), back]))
    assert blocks(batch, "a") == [11, 12]
    assert token_ids(batch, "a") == [*range(20), 30]
    assert batch.is_complete("a", 21)


def test_outputs_that_the_scheduler_dropped_are_dropped(batch):
    """A token in flight at preemption is sampled again."""
    start(batch)
    batch.append("a", PLACEHOLDER)
    batch.update(scheduler_output(continued=[Continued("b", 3, 1)]))
    back = Continued("a", 0, 1, new_blocks=[11, 12], resumed=True, num_scheduled=21)
    batch.update(scheduler_output(continued=[Continued("b", 4, 2), back]))
    assert token_ids(batch, "a") == [*range(20), 30]


def test_resumed_in_the_step_after_it_ran(batch):
    """Preempted and resumed between two steps: the row is made anew with the new blocks."""
    start(batch)
    back = Continued("a", 0, 1, new_blocks=[11, 12], resumed=True, num_scheduled=21)
    batch.update(scheduler_output(continued=[back, Continued("b", 3, 1)]))
    assert blocks(batch, "a") == [11, 12]
    assert batch.rows.num_computed_tokens_cpu[batch.rows.req_id_to_index["a"]] == 0


def test_a_late_token_takes_the_place_of_its_placeholder(batch):
    start(batch)
    position = batch.append("a", PLACEHOLDER)
    assert position == 21
    assert token_ids(batch, "a")[-1] == PLACEHOLDER
    batch.fill_placeholder("a", position, 44)
    assert token_ids(batch, "a") == [*range(20), 30, 44]
    assert batch.requests["a"].output_token_ids == [30, 44]


def test_a_late_token_of_a_request_that_is_gone(batch):
    """Ended: nothing happens. Preempted: it is kept for the return. Dropped: it stays dropped."""
    start(batch)
    position = batch.append("a", PLACEHOLDER)
    batch.update(scheduler_output(continued=[Continued("b", 3, 1)]))
    batch.fill_placeholder("a", position, 44)
    assert batch.requests["a"].output_token_ids == [30, 44]
    del batch.requests["a"].output_token_ids[1:]
    batch.fill_placeholder("a", position, 45)
    assert batch.requests["a"].output_token_ids == [30]
    batch.update(scheduler_output(continued=[Continued("b", 4, 2)], finished=["a"]))
    batch.fill_placeholder("a", position, 46)
    assert set(batch.requests) == {"b"}
    assert token_ids(batch, "b") == [7, 8, 9, 31]


def test_torch_samples_only_while_a_request_needs_it(batch):
    start(batch)
    assert not batch.samples_in_torch
    batch.update(
        scheduler_output(
            [new_request("c", [1], [9], temperature=1.0)],
            [Continued("a", 20, 1), Continued("b", 3, 1)],
        )
    )
    assert batch.samples_in_torch
    batch.update(scheduler_output(continued=[Continued("a", 21, 2), Continued("b", 4, 2)]))
    assert not batch.samples_in_torch
    back = Continued("c", 0, new_blocks=[9], resumed=True)
    batch.update(scheduler_output(continued=[Continued("a", 22, 3), back]))
    assert batch.samples_in_torch
    batch.update(scheduler_output(continued=[Continued("a", 23, 4)], finished=["c"]))
    assert not batch.samples_in_torch


def test_a_seeded_request_has_a_generator_of_its_own(batch):
    new = [new_request(n, [1], [b], temperature=1.0, seed=5) for n, b in (("a", 1), ("b", 2))]
    batch.update(scheduler_output(new))
    numbers = [torch.rand(3, generator=batch.rows.generators[row]) for row in (0, 1)]
    assert torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_prompts_that_await_their_logprobs(batch):
    batch.update(scheduler_output([new_request("a", [1, 2], [1], prompt_logprobs=0)]))
    assert batch.unscored_prompts == {"a"}
    batch.update(scheduler_output(finished=["a"]))
    assert batch.unscored_prompts == set()


def drafted(drafts: dict[str, list[int]], **settings):
    """A step of some requests with drafts behind their newest tokens."""
    scheduled = scheduler_output(**settings)
    scheduled.scheduled_spec_decode_tokens = drafts
    return scheduled


def test_segments_in_the_schedulers_order(batch):
    """A request goes on with one token and its drafts; all else is a chunk."""
    start(batch)
    long = new_request("c", range(40), [7, 8, 9])
    scheduled = drafted(
        {"b": [60, 61]},
        new=[long],
        continued=[Continued("b", 3, 1, num_scheduled=3), Continued("a", 20, 1)],
        num_scheduled={"c": 16},
    )
    batch.update(scheduled)
    rows = batch.rows.req_id_to_index
    by_name = {segment.req_id: segment for segment in batch.segments(scheduled)}
    assert list(by_name) == list(scheduled.num_scheduled_tokens)
    assert by_name["a"] == Segment("a", rows["a"], 20, 1, Kind.DECODE)
    assert by_name["b"] == Segment("b", rows["b"], 3, 3, Kind.DECODE, True, (60, 61))
    assert by_name["c"] == Segment("c", rows["c"], 0, 16, Kind.CHUNK, samples=False)


def test_the_schedulers_padding_is_not_computed(batch):
    """A request that joins or rejoins with one token left is padded with drafts of -1."""
    new = new_request("a", range(17), [5, 2], num_computed_tokens=16)
    scheduled = drafted({"a": [-1, -1]}, new=[new], num_scheduled={"a": 3})
    batch.update(scheduled)
    assert batch.segments(scheduled) == [Segment("a", 0, 16, 1, Kind.CHUNK)]
    batch.append("a", 30)
    back = Continued("a", 17, 1, new_blocks=[5, 2], resumed=True, num_scheduled=3)
    scheduled = drafted({"a": [-1, -1]}, continued=[back])
    batch.update(scheduled)
    assert batch.segments(scheduled) == [Segment("a", 0, 17, 1, Kind.CHUNK)]
    batch.append("a", 31)
    scheduled = drafted({"a": [40, -1]}, continued=[Continued("a", 18, 2, num_scheduled=3)])
    batch.update(scheduled)
    assert batch.segments(scheduled) == [Segment("a", 0, 18, 2, Kind.DECODE, True, (40,))]
