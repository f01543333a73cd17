"""Tokens of a step in flight: to their requests, once they are there."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import mlx.core as mx
from vllm.v1.outputs import ModelRunnerOutput

from vllm_metal.runner.pending_tokens import PendingTokens


def no_report(_, req_ids) -> None:
    assert not req_ids


def test_a_request_with_nans_gets_no_token_and_is_reported():
    """One whose own logits are NaN, in another order than the rows, and one whose prompt's are."""
    output = ModelRunnerOutput(
        req_ids=list("abcd"), req_id_to_index={name: i for i, name in enumerate("abcd")}
    )
    tokens, finite = mx.array([0, 9, 4, 3], mx.int32), mx.array([False, True, True, True])
    reported = []
    positions = {"b": 5, "a": 3, "c": 4, "d": 2}
    arguments = tokens, finite, lambda: None, positions, output, ["d"]
    pending = PendingTokens(*arguments, lambda *report: reported.append(report))
    assert pending.get_output().sampled_token_ids == [[9], [], [4], []]
    assert reported == [(output, ["d", "b"])]


def test_pending_tokens_find_their_rows():
    """Rows that sample nothing, and tokens in another order than the rows."""
    output = ModelRunnerOutput(req_ids=["a", "b", "c"], req_id_to_index={"a": 0, "b": 1, "c": 2})
    tokens = mx.array([7, 9], mx.int32)
    finite = mx.array([True, True])
    pending = PendingTokens(tokens, finite, lambda: None, {"c": 5, "a": 3}, output, [], no_report)
    assert pending.get_output().sampled_token_ids == [[9], [], [7]]


def test_two_threads_wait_for_one_step_and_read_it_once():
    """vLLM's thread that hands results on, and the runner's."""
    computed, waits = Event(), []

    def wait():
        waits.append(computed.wait(10))

    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    tokens, finite = mx.array([7], mx.int32), mx.array([True])
    pending = PendingTokens(tokens, finite, wait, {"a": 3}, output, [], no_report)
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(pending.wait) for _ in range(2)]
        computed.set()
        assert [result.result() for result in results] == [[7], [7]]
    assert waits == [True]
