"""When an argmax suffices, and vLLM's sampler where it does not."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.scheduler_outputs import Continued, new_request, scheduler_output
from vllm_metal.runner.request_batch import RequestBatch
from vllm_metal.runner.sampler import TorchSampler, greedy, needs_torch, to_torch

VOCABULARY = 96


def greedy_params(**params) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0} | params))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 5, "ignore_eos": True},
        {"stop": ["x"], "stop_token_ids": [3]},
        {"seed": 4},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_an_argmax_suffices(params):
    """At temperature 0 truncation and seed change nothing; stops are not the sampler's."""
    assert not needs_torch(greedy_params(**params))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "seed": 4},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
        {"logprobs": 0},
        {"logprobs": 5},
        {"prompt_logprobs": 0},
        {"logprob_token_ids": [4]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"extra_args": {"my_processor": 1}},
        {"thinking_token_budget": 0},
    ],
    ids=str,
)
def test_vllms_sampler_is_needed(params):
    assert needs_torch(greedy_params(**params))


def test_bad_words_need_vllms_sampler():
    params = greedy_params()
    params._bad_words_token_ids = [[3]]
    assert needs_torch(params)


def test_greedy():
    logits = mx.array([[0.0, 3.0, 1.0], [5.0, -1.0, 5.0]])
    tokens = greedy(logits)
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == mx.int32


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_logits_in_torch_are_a_copy(dtype):
    """The sampler edits them in place."""
    logits = mx.array([[1.5, -2.0]], dtype)
    converted = to_torch(logits)
    assert converted.dtype == torch.float32
    converted[0, 0] = 9
    assert logits.tolist() == [[1.5, -2.0]]
    assert converted.tolist() == [[9.0, -2.0]]


@pytest.fixture
def batch(make_config) -> RequestBatch:
    """Rows: greedy, seeded, seeded."""
    batch = RequestBatch(make_config(), [16], [8])
    batch.update(
        scheduler_output(
            [
                new_request("greedy", [1, 2], [1]),
                new_request("one", [1, 2], [2], temperature=1.0, seed=7),
                new_request("two", [1, 2], [3], temperature=1.0, seed=7),
            ]
        )
    )
    return batch


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)


def test_rows_sample_as_their_requests_ask(batch):
    sampled = TorchSampler("raw_logprobs").sample(logits(), batch.rows, []).sampled_token_ids
    assert sampled[0, 0] == logits()[0].argmax()
    assert sampled[1, 0] == sampled[2, 0]
    assert sampled.shape == (3, 1)


def test_temperature_is_the_spread_of_what_is_drawn(make_config):
    """Of two tokens, one e^2 times as likely: e times at temperature 2, without a seed."""
    batch = RequestBatch(make_config(), [16], [8])
    requests = [new_request(f"r{i}", [1], [i + 1], temperature=2.0) for i in range(8)]
    batch.update(scheduler_output(requests))
    logits = torch.full((8, VOCABULARY), -torch.inf)
    logits[:, 3], logits[:, 4] = 2.0, 0.0
    sampler = TorchSampler("raw_logprobs")
    draws = [sampler.sample(logits.clone(), batch.rows, []).sampled_token_ids for _ in range(250)]
    drawn = torch.cat(draws)
    assert set(drawn.flatten().tolist()) == {3, 4}
    share = math.e / (1 + math.e)
    deviation = math.sqrt(share * (1 - share) / drawn.numel())
    assert (drawn == 3).double().mean() == pytest.approx(share, abs=4 * deviation)


def test_an_unfinished_prompt_leaves_its_generator_as_it_was(batch):
    """Row 1 is discarded three times and then samples what row 2 sampled at first."""
    sampler = TorchSampler("raw_logprobs")
    first = sampler.sample(logits(), batch.rows, [1]).sampled_token_ids[2, 0]
    second = sampler.sample(logits(), batch.rows, [1]).sampled_token_ids[2, 0]
    sampler.sample(logits(), batch.rows, [1, 2])
    row_one = [sampler.sample(logits(), batch.rows, [2]).sampled_token_ids[1, 0] for _ in range(2)]
    assert row_one == [first, second]


def prompt_scores(batch: RequestBatch, prompt: list[int], chunks: list[int], wanted: int):
    """Scores of a prompt computed in chunks, from logits that depend on the position alone."""
    table = torch.randn(len(prompt), VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampler, start, scores = TorchSampler("raw_logprobs"), 0, None
    batch.update(
        scheduler_output(
            [new_request("r", prompt, [5], prompt_logprobs=wanted)],
            num_scheduled={"r": chunks[0]},
        )
    )
    for i, length in enumerate(chunks):
        if i:
            step = Continued("r", start, num_scheduled=length)
            batch.update(scheduler_output(continued=[step]))
        assert scores is None
        scores = sampler.score_prompt(
            batch.requests["r"],
            length,
            VOCABULARY,
            lambda n, start=start: table[start : start + n].clone(),
        )
        start += length
    return scores, torch.log_softmax(table, -1)


@pytest.mark.parametrize("chunks", [[9], [4, 5], [8, 1], [1] * 9], ids=str)
@pytest.mark.parametrize("wanted", [0, 3, -1])
def test_prompt_logprobs_under_any_chunking(batch, chunks, wanted):
    prompt = list(range(3, 30, 3))
    scores, expected = prompt_scores(batch, prompt, chunks, wanted)
    num_logprobs = VOCABULARY if wanted == -1 else wanted
    assert scores.logprobs.shape == (8, num_logprobs + 1)
    for position, token in enumerate(prompt[1:]):
        assert scores.logprob_token_ids[position, 0] == token
        assert scores.logprobs[position, 0] == pytest.approx(
            expected[position, token].item(), abs=1e-5
        )
        rank = int((expected[position] >= expected[position, token]).sum())
        assert scores.selected_token_ranks[position] == rank
        np.testing.assert_allclose(
            scores.logprobs[position, 1:], expected[position].topk(num_logprobs).values, atol=1e-5
        )


def test_a_prompt_of_one_token_has_no_logprobs(batch):
    scores, _ = prompt_scores(batch, [4], [1], 2)
    assert scores.logprobs.shape == (0, 3)


def test_raw_logits_instead_of_logprobs(batch):
    batch.update(scheduler_output([new_request("r", [4, 5], [5], prompt_logprobs=0)]))
    table = torch.arange(float(VOCABULARY))[None]
    scores = TorchSampler("raw_logits").score_prompt(
        batch.requests["r"], 2, VOCABULARY, lambda n: table[:n].clone()
    )
    assert scores.logprobs.tolist() == [[5.0]]
