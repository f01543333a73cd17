"""A request whose logits are not finite ends with an error, and its neighbours go on."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request, RequestStatus

from tests.serving import Serving
from vllm_metal import scheduler as scheduler_module

NAN_TOKEN = 7
"""A token whose embedding is NaN in these tests."""


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def async_scheduling(request) -> bool:
    return request.param


class RecordingServing(Serving):
    """Keeps what clients are sent, and can damage the weights of the model."""

    def __init__(self, config):
        super().__init__(config)
        self.sent: list[EngineCoreOutput] = []
        update = self.scheduler.update_from_output

        def recorded(*arguments):
            outputs = update(*arguments)
            self.sent += [part for client in outputs.values() for part in client.outputs]
            return outputs

        self.scheduler.update_from_output = recorded

    @property
    def embeddings(self) -> np.ndarray:
        """The rows of all tokens, in the model's own memory: traced steps see a change, too."""
        return np.array(self.worker.binding.model.model.embed_tokens.weight, copy=False)

    def last_sent(self, name: str) -> EngineCoreOutput:
        return [output for output in self.sent if output.request_id == name][-1]


def prompt(length: int, seed: int = 0) -> list[int]:
    """A random prompt without `NAN_TOKEN`."""
    token_ids = np.random.default_rng([length, seed]).integers(NAN_TOKEN + 1, 60, length)
    return token_ids.tolist()


PROMPTS = [prompt(length) for length in (5, 17, 33)]
FAILING = [*prompt(9), NAN_TOKEN, *prompt(4)]


def output_tokens(request: Request) -> list[int]:
    return list(request.output_token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 2},
        pytest.param({"prompt_logprobs": 2}, marks=pytest.mark.nightly),
        pytest.param({"min_tokens": 3}, marks=pytest.mark.nightly),
    ],
    ids=["greedy", "sampled", "logprobs", "prompt logprobs", "processed"],
)
def test_one_request_of_a_batch(make_config, async_scheduling, params):
    """Of its three neighbours, one is in its prefill and two decode when it joins."""
    config = make_config(async_scheduling=async_scheduling, enable_prefix_caching=False)
    serving = RecordingServing(config)
    expected = serving.generate(PROMPTS, max_tokens=12, **params)
    serving.embeddings[NAN_TOKEN] = np.nan
    requests = [serving.add(str(i), p, max_tokens=12, **params) for i, p in enumerate(PROMPTS[:2])]
    for _ in range(3):
        serving.step()
    failing = serving.add("failing", FAILING, max_tokens=12, **params)
    requests.append(serving.add("2", PROMPTS[2], max_tokens=12, **params))
    serving.run()
    assert [output_tokens(request) for request in requests] == expected
    assert failing.status == RequestStatus.FINISHED_ERROR and not failing.output_token_ids
    error = serving.last_sent("failing")
    assert error.finish_reason == FinishReason.ERROR and error.num_nans_in_logits == 1
    assert all(serving.last_sent(str(i)).finish_reason == FinishReason.LENGTH for i in range(3))
    assert all(output.num_nans_in_logits == 0 for output in serving.sent if output is not error)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "seed": 3}, {"logprobs": 2}], ids=str)
def test_in_the_middle_of_an_answer(make_config, async_scheduling, params):
    """The tokens before are kept; the one whose logits are not finite never comes."""
    config = make_config(async_scheduling=async_scheduling, enable_prefix_caching=False)
    serving = RecordingServing(config)
    expected = serving.generate(PROMPTS, max_tokens=12, **params)
    seen = {token for tokens in (*expected[1:], *PROMPTS) for token in tokens}
    place = next(i for i, token in enumerate(expected[0]) if token not in seen)
    serving.embeddings[expected[0][place]] = np.nan
    requests = [serving.add(str(i), p, max_tokens=12, **params) for i, p in enumerate(PROMPTS)]
    serving.run()
    assert output_tokens(requests[0]) == expected[0][: place + 1]
    assert requests[0].status == RequestStatus.FINISHED_ERROR
    assert [output_tokens(request) for request in requests[1:]] == expected[1:]


def test_every_request_fails_where_one_logit_of_all_is_nan(make_config, async_scheduling):
    """A row of the language-model head is damaged."""
    serving = RecordingServing(make_config(async_scheduling=async_scheduling))
    np.array(serving.worker.binding.model.lm_head.weight, copy=False)[2] = np.nan
    requests = [serving.add(str(i), p) for i, p in enumerate(PROMPTS)]
    serving.run()
    assert {request.status for request in requests} == {RequestStatus.FINISHED_ERROR}


def test_prompt_logprobs_that_are_nan_end_a_request_at_once(make_config, async_scheduling):
    """The rest of the prompt is not computed, but for what is scheduled one step ahead."""
    config = make_config(
        async_scheduling=async_scheduling, max_num_batched_tokens=16, enable_prefix_caching=False
    )
    serving = RecordingServing(config)
    serving.embeddings[NAN_TOKEN] = np.nan
    failing = serving.add("failing", [NAN_TOKEN, *prompt(60)], prompt_logprobs=1)
    serving.run()
    assert failing.status == RequestStatus.FINISHED_ERROR
    assert failing.num_computed_tokens == (32 if async_scheduling else 16)


def test_nan_prompt_logprobs_end_a_request_whose_last_logits_are_finite(
    make_config, async_scheduling, monkeypatch
):
    """As where the last token lies in a sliding window that does not see the token of NaN."""
    serving = RecordingServing(
        make_config(async_scheduling=async_scheduling, enable_prefix_caching=False)
    )
    forward = serving.runner.bound_model.forward_to_head

    def first_row_is_nan(token_ids, metadata):
        chunk = forward(token_ids, metadata)
        rows = mx.arange(token_ids.shape[1])[None, :, None]
        failing = (rows == 0) & (token_ids[0, 0] == NAN_TOKEN)
        return replace(chunk, hidden=mx.where(failing, mx.nan, chunk.hidden))

    monkeypatch.setattr(serving.runner.bound_model, "forward_to_head", first_row_is_nan)
    failing = serving.add("failing", [NAN_TOKEN, *prompt(8)], prompt_logprobs=1)
    healthy = serving.add("healthy", prompt(8), prompt_logprobs=1)
    serving.run()
    assert failing.status == RequestStatus.FINISHED_ERROR and not failing.output_token_ids
    assert healthy.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_its_blocks_leave_the_prefix_cache(make_config, async_scheduling):
    """The same prompt is computed anew after the weights have been repaired."""
    serving = RecordingServing(make_config(async_scheduling=async_scheduling))
    healthy = serving.embeddings[NAN_TOKEN].copy()
    serving.embeddings[NAN_TOKEN] = np.nan
    long = [*prompt(40), NAN_TOKEN, *prompt(20)]
    serving.add("failing", long)
    serving.run()
    serving.embeddings[NAN_TOKEN] = healthy
    again = serving.add("again", long)
    serving.run()
    assert serving.cached_tokens["again"] == 0
    assert again.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_requests_that_are_given_its_blocks_are_unharmed(make_config, async_scheduling):
    """Pages that hold NaN beyond the end of a request."""
    config = make_config(
        async_scheduling=async_scheduling, enable_prefix_caching=False, num_gpu_blocks_override=10
    )
    serving = RecordingServing(config)
    expected = serving.generate(PROMPTS, max_tokens=12)
    serving.embeddings[NAN_TOKEN] = np.nan
    failing = serving.add("failing", [NAN_TOKEN, *prompt(120)])
    serving.run()
    assert failing.status == RequestStatus.FINISHED_ERROR
    assert serving.generate(PROMPTS, max_tokens=12) == expected


def test_a_request_that_has_ended_meanwhile_is_left_alone(make_config):
    """Aborted by its client while its step is in flight."""
    serving = RecordingServing(make_config(async_scheduling=True, enable_prefix_caching=False))
    serving.embeddings[NAN_TOKEN] = np.nan
    serving.add("failing", FAILING)
    serving.step()
    serving.scheduler.finish_requests("failing", RequestStatus.FINISHED_ABORTED)
    serving.run()
    assert not [output for output in serving.sent if output.request_id == "failing"]


def test_the_log_names_the_request(make_config, monkeypatch):
    logged = []
    monkeypatch.setattr(
        scheduler_module.logger, "error", lambda text, *args: logged.append(text % args)
    )
    serving = RecordingServing(make_config(async_scheduling=False))
    serving.embeddings[NAN_TOKEN] = np.nan
    serving.add("failing", FAILING)
    serving.run()
    [line] = logged
    assert line.startswith("Request failing ends with an error after 0 tokens")
