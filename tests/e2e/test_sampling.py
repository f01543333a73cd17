"""Every sampling parameter reaches vLLM's sampler, and a seed means the same under any chunking."""

import json
import math

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.e2e import engine as e2e
from tests.tiny_models import VOCABULARY

pytestmark = pytest.mark.engine

SPACE = 0
"""Its token."""
LIMITS = {"max_model_len": 256, "kv_cache_memory_bytes": 16 << 20}


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(0, VOCABULARY - 1, 160).tolist()


@pytest.fixture(scope="module")
def llm(reading_model):
    with e2e.engine(reading_model, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def chunking_engine(reading_model):
    chunks = {"max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with e2e.engine(reading_model, **LIMITS, **chunks) as llm:
        yield llm


def run(llm, prompt, **params):
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | params)
    return llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]


def tokens(llm, prompt, **params):
    return list(run(llm, prompt, **params).outputs[0].token_ids)


@pytest.fixture(scope="module")
def greedy(llm, prompt):
    return tokens(llm, prompt, temperature=0)


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_in_chunks(llm, chunking_engine, prompt):
    seeded = [
        SamplingParams(temperature=1.0, seed=seed, top_p=0.95, max_tokens=16, ignore_eos=True)
        for seed in (3, 4, 5)
    ]
    alone = [e2e.generate(llm, [prompt], params)[0] for params in seeded]
    assert alone[0] != alone[1]
    llm.reset_prefix_cache()
    assert e2e.generate(llm, [prompt] * 3, seeded) == alone
    assert e2e.generate(chunking_engine, [prompt] * 3, seeded) == alone


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_limits_that_leave_one_token_are_greedy(llm, prompt, greedy, limit):
    assert tokens(llm, prompt, temperature=1.0, **limit) == greedy


def test_greedy_requests_beside_sampled_ones_keep_their_tokens(llm, prompt, greedy):
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
    ]
    first, _, third = e2e.generate(llm, [prompt] * 3, params)
    assert first == greedy
    assert third == greedy


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalties_reduce_repetition(llm, prompt, penalty):
    plain = tokens(llm, prompt, temperature=0, max_tokens=40)
    penalised = tokens(llm, prompt, temperature=0, max_tokens=40, **penalty)
    assert len(set(penalised)) > len(set(plain))


def test_logit_bias_forces_and_bad_words_forbid(llm, prompt, greedy):
    assert tokens(llm, prompt, temperature=0, logit_bias={42: 100.0}) == [42] * 12
    word = llm.get_tokenizer().decode(greedy[:1])
    assert greedy[0] not in tokens(llm, prompt, temperature=0, bad_words=[word])[:1]


def test_allowed_token_ids(llm, prompt):
    assert set(tokens(llm, prompt, temperature=0, allowed_token_ids=[50, 60])) <= {50, 60}


def test_min_tokens_and_stop_token_ids(llm, prompt, greedy):
    stopping = {"temperature": 0, "stop_token_ids": [greedy[2]], "ignore_eos": False}
    assert len(tokens(llm, prompt, **stopping)) == greedy.index(greedy[2]) + 1
    assert len(tokens(llm, prompt, **stopping, min_tokens=9)) >= 9


def test_stop_strings(llm, prompt, greedy):
    text = llm.get_tokenizer().decode(greedy)
    stop = text[len(text) // 2 :][:4]
    output = run(llm, prompt, temperature=0, stop=[stop]).outputs[0]
    assert stop not in output.text
    assert output.finish_reason == "stop"


def test_n_gives_n_outputs(llm, prompt):
    outputs = run(llm, prompt, n=3, seed=1, temperature=1.0).outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 3


def test_logprobs_name_the_sampled_token_and_its_rank(llm, prompt, greedy):
    output = run(llm, prompt, temperature=0, logprobs=4).outputs[0]
    assert list(output.token_ids) == greedy
    for token, scores in zip(output.token_ids, output.logprobs, strict=True):
        assert scores[token].rank == 1
        assert sum(math.exp(score.logprob) for score in scores.values()) <= 1.0001


def test_prompt_logprobs_are_the_same_in_chunks(llm, chunking_engine, prompt):
    def scores(engine):
        given = run(engine, prompt, temperature=0, max_tokens=2, prompt_logprobs=2)
        assert given.prompt_logprobs[0] is None
        return [
            at[token].logprob
            for at, token in zip(given.prompt_logprobs[1:], prompt[1:], strict=True)
        ]

    assert scores(chunking_engine) == pytest.approx(scores(llm), abs=2e-4)


def is_pair(text: str) -> bool:
    return json.loads(text) in ([1, 1], [1, 2], [2, 1], [2, 2])


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": r"\d{3}-\d{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
        # no strings: the quotation mark is the model's end-of-sequence token
        (
            {"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}},
            is_pair,
        ),
        ({"grammar": 'root ::= "cat" | "dog"'}, lambda text: text in ("cat", "dog")),
    ],
)
def test_structured_outputs_beside_a_plain_request(llm, prompt, greedy, constraint, holds):
    constrained = SamplingParams(
        temperature=0,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(**constraint),
        logit_bias={SPACE: -100.0},  # JSON may have any number of them
    )
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt}] * 2, [constrained, plain], use_tqdm=False)
    assert holds(outputs[0].outputs[0].text), outputs[0].outputs[0].text
    assert list(outputs[1].outputs[0].token_ids) == greedy
