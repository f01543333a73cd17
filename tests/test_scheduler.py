"""A request whose logits are not numbers ends with an error, and its neighbours go on."""

import logging

import mlx.core as mx
import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request, RequestStatus

from tests.serving import Serving
from vllm_metal import scheduler as scheduler_module

POISON = 7
"""A token whose embedding is NaN in these tests."""


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def async_scheduling(request) -> bool:
    return request.param


class Told(Serving):
    """Notes what clients are told, and may poison the model."""

    def __init__(self, config):
        super().__init__(config)
        self.told: list[EngineCoreOutput] = []
        update = self.scheduler.update_from_output

        def noted(*arguments):
            outputs = update(*arguments)
            self.told += [part for client in outputs.values() for part in client.outputs]
            return outputs

        self.scheduler.update_from_output = noted

    def poison(self, token: int) -> None:
        """From now on this token's embedding is NaN, and with it all that is computed from it."""
        embedding = self.worker.binding.model.model.embed_tokens
        embedding.weight = mx.where(
            (mx.arange(embedding.weight.shape[0]) == token)[:, None], mx.nan, embedding.weight
        )
        mx.eval(embedding.weight)

    def last(self, name: str) -> EngineCoreOutput:
        return [output for output in self.told if output.request_id == name][-1]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Without the token that is poisoned."""
    token_ids = np.random.default_rng([length, seed]).integers(POISON + 1, 60, length)
    return token_ids.tolist()


PROMPTS = [prompt(length) for length in (5, 17, 33)]
SICK = [*prompt(9), POISON, *prompt(4)]


def settings(request: Request) -> list[int]:
    return list(request.output_token_ids)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 2},
        {"prompt_logprobs": 2},
        {"min_tokens": 3},
    ],
    ids=["greedy", "sampled", "logprobs", "prompt logprobs", "processed"],
)
def test_one_request_of_a_batch(make_config, async_scheduling, params):
    """Of three neighbours, one prefills and two decode when it joins."""
    config = make_config(async_scheduling=async_scheduling, enable_prefix_caching=False)
    serving = Told(config)
    expected = serving.generate(PROMPTS, max_tokens=12, **params)
    serving.poison(POISON)
    requests = [serving.add(str(i), p, max_tokens=12, **params) for i, p in enumerate(PROMPTS[:2])]
    for _ in range(3):
        serving.step()
    sick = serving.add("sick", SICK, max_tokens=12, **params)
    requests.append(serving.add("2", PROMPTS[2], max_tokens=12, **params))
    serving.run()
    assert [list(request.output_token_ids) for request in requests] == expected
    assert sick.status == RequestStatus.FINISHED_ERROR and not sick.output_token_ids
    told = serving.last("sick")
    assert told.finish_reason == FinishReason.ERROR and told.num_nans_in_logits == 1
    assert all(serving.last(str(i)).finish_reason == FinishReason.LENGTH for i in range(3))
    assert all(output.num_nans_in_logits == 0 for output in serving.told if output is not told)


def test_in_the_middle_of_an_answer(make_config, async_scheduling):
    """The tokens before are kept; the one whose logits are not numbers never comes."""
    serving = Told(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    expected = serving.generate(PROMPTS, max_tokens=12)
    others = {token for answer in expected[1:] for token in answer}
    own = [i for i, t in enumerate(expected[0][:10]) if t not in others and t not in PROMPTS[0]]
    others |= {token for p in PROMPTS[1:] for token in p}
    place = next(i for i in own if expected[0][i] not in others)
    serving.poison(expected[0][place])
    requests = [serving.add(str(i), p, max_tokens=12) for i, p in enumerate(PROMPTS)]
    serving.run()
    assert list(requests[0].output_token_ids) == expected[0][: place + 1]
    assert requests[0].status == RequestStatus.FINISHED_ERROR
    assert [list(request.output_token_ids) for request in requests[1:]] == expected[1:]


def test_logits_that_are_nan_for_everybody(make_config, async_scheduling):
    """A row of the language-model head, so that one logit of every request is NaN."""
    serving = Told(make_config(async_scheduling=async_scheduling))
    head = serving.worker.binding.model
    head = getattr(head, "lm_head", None) or head.model.embed_tokens
    head.weight = mx.where((mx.arange(head.weight.shape[0]) == 2)[:, None], mx.nan, head.weight)
    requests = [serving.add(str(i), p) for i, p in enumerate(PROMPTS)]
    serving.run()
    assert {request.status for request in requests} == {RequestStatus.FINISHED_ERROR}


def test_a_chunk_whose_prompt_is_scored_ends_it_at_once(make_config):
    """The rest of the prompt is not computed any more."""
    serving = Told(make_config(max_num_batched_tokens=16, enable_prefix_caching=False))
    serving.poison(POISON)
    sick = serving.add("sick", [POISON, *prompt(60)], prompt_logprobs=1)
    serving.run()
    assert sick.status == RequestStatus.FINISHED_ERROR
    assert sick.num_computed_tokens < 60


def test_its_blocks_are_not_given_to_other_requests(make_config, async_scheduling):
    """A prompt that failed is computed anew, and so is what follows in its blocks."""
    serving = Told(make_config(async_scheduling=async_scheduling))
    healthy = serving.worker.binding.model.model.embed_tokens.weight
    serving.poison(POISON)
    long = [*prompt(40), POISON, *prompt(20)]
    serving.add("sick", long)
    serving.run()
    serving.worker.binding.model.model.embed_tokens.weight = healthy
    again = serving.add("again", long)
    serving.run()
    assert serving.cached_tokens["again"] == 0
    assert again.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_a_request_that_has_ended_meanwhile_is_left_alone(make_config):
    """Aborted by its client while its step is in flight."""
    serving = Told(make_config(async_scheduling=True, enable_prefix_caching=False))
    serving.poison(POISON)
    serving.add("sick", SICK)
    serving.step()
    serving.scheduler.finish_requests("sick", RequestStatus.FINISHED_ABORTED)
    serving.run()
    assert not [output for output in serving.told if output.request_id == "sick"]


def test_the_log_names_the_request(make_config, monkeypatch):
    said = []
    monkeypatch.setattr(
        scheduler_module.logger, "error", lambda text, *args: said.append(text % args)
    )
    serving = Told(make_config(async_scheduling=False))
    serving.poison(POISON)
    serving.add("sick", SICK)
    serving.run()
    assert len(said) == 1 and said[0].startswith("Request sick ends with an error after 0 tokens")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_scheduler_is_vllms_but_for_that(make_config, asynchronous, caplog):
    with caplog.at_level(logging.WARNING):
        scheduler = make_config(async_scheduling=asynchronous).scheduler_config.get_scheduler_cls()
    expected = scheduler_module.AsyncMetalScheduler if asynchronous else None
    assert scheduler is (expected or scheduler_module.MetalScheduler)
    assert "custom scheduler" not in caplog.text


def test_a_scheduler_of_the_users_is_left_alone(make_config):
    name = "vllm.v1.core.sched.scheduler.Scheduler"
    config = make_config(scheduler_cls=name, async_scheduling=False)
    assert config.scheduler_config.scheduler_cls == name
