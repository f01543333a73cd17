"""When an argmax suffices, and vLLM's sampler where it does not."""

import dataclasses
import inspect
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.metadata import SamplingMetadata

from tests.runner.sampling import ASK_SAMPLER, METADATA, SAMPLING_PARAMS, Forces5, Sharpens
from tests.scheduler_outputs import Continued, new_request, scheduler_output
from tests.serving import Serving
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner import sampler
from vllm_metal.runner.request_batch import RequestBatch
from vllm_metal.runner.sampler import (
    TorchSampler,
    custom_processors,
    greedy,
    needs_torch,
    to_torch,
)

VOCABULARY = 96


def test_every_sampling_parameter_is_decided():
    """A parameter that a new vLLM brings is not greedily ignored."""
    assert set(SAMPLING_PARAMS) == set(SamplingParams.__struct_fields__)


def test_all_that_the_sampler_reads_is_decided():
    assert list(METADATA) == [field.name for field in dataclasses.fields(SamplingMetadata)]
    source = inspect.getsource(needs_torch)
    asked = [name for name in METADATA if f"metadata.{name}" in source]
    assert asked == [name for name, decision in METADATA.items() if decision == ASK_SAMPLER]


def asks_for_torch(make_config, **params) -> bool:
    """Whether a batch of one request, greedy unless `params` says otherwise, needs torch."""
    config = make_config()
    config.reasoning_config = ReasoningConfig()
    config.reasoning_config._reasoning_start_token_ids = [1]
    config.reasoning_config._reasoning_end_token_ids = [2]
    batch = RequestBatch(config, [BlockTableSize(16, 8)])
    batch.update(scheduler_output([new_request("request", [1, 2], [1], **params)]))
    return needs_torch(batch.rows.sampling_metadata)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 5, "ignore_eos": True},
        {"stop": ["x"], "stop_token_ids": [3]},
        {"seed": 4},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
        {"prompt_logprobs": 0},
        {"extra_args": {"no_processor_reads_this": 1}},
    ],
    ids=str,
)
def test_an_argmax_suffices(make_config, params):
    """At temperature 0 truncation and seed change nothing; stops are not the sampler's."""
    assert not asks_for_torch(make_config, **params)


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
        {"logprob_token_ids": [4]},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"_bad_words_token_ids": [[3]]},
        {"thinking_token_budget": 0},
    ],
    ids=str,
)
def test_vllms_sampler_is_needed(make_config, params):
    assert asks_for_torch(make_config, **params)


def test_min_tokens_need_vllms_sampler_until_they_are_reached(make_config):
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
    batch.update(scheduler_output([new_request("a", [1, 2], [1], min_tokens=1)]))
    assert batch.samples_in_torch
    batch.append("a", 3)
    batch.update(scheduler_output(continued=[Continued("a", 2, 1)]))
    assert not batch.samples_in_torch


def test_vllms_own_processors_are_known_by_what_they_hold(make_config):
    """An attribute that vLLM renames is an error, not a processor that is never asked."""
    processors = RequestBatch(make_config(), [BlockTableSize(16, 8)]).rows.logitsprocs
    assert {type(p) for p in processors.all} == set(BUILTIN_LOGITS_PROCESSORS)
    assert {type(p) for p in processors.non_argmax_invariant} == set(sampler._IDLE_WITHOUT)
    assert custom_processors(processors) == []


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a processor as a package does, with an entry point."""

    def install(processor: type) -> None:
        folder = tmp_path / "processor-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: processor\nVersion: 1.0\n")
        target = f"{processor.__module__}:{processor.__qualname__}"
        (folder / "entry_points.txt").write_text(f"[vllm.logits_processors]\nown = {target}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_installed_processor_is_obeyed_by_greedy_requests(
    make_config, install, async_scheduling
):
    install(Forces5)
    serving = Serving(make_config(async_scheduling=async_scheduling))
    assert serving.generate([[1, 2, 3], [4]], max_tokens=3) == [[5, 5, 5], [5, 5, 5]]
    assert serving.runner.batch.rows.logitsprocs_need_output_token_ids


def test_an_installed_processor_that_keeps_the_order_leaves_greedy_steps_to_mlx(
    make_config, install
):
    install(Sharpens)
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
    assert [type(p) for p in custom_processors(batch.rows.logitsprocs)] == [Sharpens]
    batch.update(scheduler_output([new_request("a", [1, 2], [1])]))
    assert not batch.samples_in_torch


def test_gumbel_noise_in_double_precision_on_request():
    assert TorchSampler("raw_logprobs", True)._sampler.topk_topp_sampler.use_fp64_gumbel


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
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
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
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
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
    sample = TorchSampler("raw_logprobs").sample
    first = sample(logits(), batch.rows, [1]).sampled_token_ids[2, 0]
    second = sample(logits(), batch.rows, [1]).sampled_token_ids[2, 0]
    sample(logits(), batch.rows, [1, 2])
    row_one = [sample(logits(), batch.rows, [2]).sampled_token_ids[1, 0] for _ in range(2)]
    assert row_one == [first, second]


def prompt_scores(batch: RequestBatch, prompt: list[int], chunks: list[int], wanted: int):
    """Scores of a prompt computed in chunks, from logits that depend on the position alone."""
    table = torch.randn(len(prompt), VOCABULARY, generator=torch.Generator().manual_seed(1))
    torch_sampler, start, scores = TorchSampler("raw_logprobs"), 0, None
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
        scores = torch_sampler.score_prompt(
            batch.requests["r"],
            length,
            VOCABULARY,
            lambda begin, end, start=start: table[start + begin : start + end].clone(),
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
        batch.requests["r"], 2, VOCABULARY, lambda begin, end: table[begin:end].clone()
    )
    assert scores.logprobs.tolist() == [[5.0]]
