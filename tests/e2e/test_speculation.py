"""Drafts save steps and change no token, whether they are right or wrong.

Here is no engine: the runner under vLLM's scheduler, over symbolic pages and over a tiny model.
`test_speculating_engines.py` has the engine.
"""

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from tests.drafts import Guesses
from tests.e2e.test_scheduling import KINDS, MAX_MODEL_LEN, PREFIXES
from tests.serving import Serving
from tests.symbolic_pages import SymbolicServing, expected_tokens
from tests.tiny_models import VOCABULARY, tiny_model
from tests.traffic import Arrival, prompt, serve

NEW_TOKENS = 20
PROMPTS = [
    np.random.default_rng([length, 7]).integers(0, VOCABULARY, length).tolist()
    for length in (1, 2, 15, 16, 17, 50, 33)
]


def drafting(count: int = 4, **more) -> dict:
    """Settings of an engine that speculates."""
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    return {"speculative_config": lookup | {"num_speculative_tokens": count}, **more}


def symbolic(make_config, kind: str, rng: random.Random, num_blocks: int, **settings):
    """A server over symbolic pages whose drafts are right more often than not."""
    config = make_config(**drafting(rng.randrange(1, 8), max_model_len=MAX_MODEL_LEN, **settings))
    serving = SymbolicServing(config, KINDS[kind].specs, num_blocks)
    vocab_size = config.model_config.get_vocab_size()

    def answer_of(token_ids: list[int], num_tokens: int) -> list[int]:
        return expected_tokens(token_ids, num_tokens, vocab_size)

    serving.runner._proposer = Guesses(config, answer_of, 0.7, rng)
    return serving, answer_of, vocab_size


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[] if i < 2 else pytest.mark.nightly) for i in range(12)]
)
def test_random_traffic(make_config, kind, seed):
    """Nothing that a rejected draft left is read, nor found in the prefix cache."""
    rng = random.Random(f"drafts {kind} {seed}")
    budget = rng.choice([15, 16, 17, 23, 31, 64, 256])
    serving, answer_of, vocab_size = symbolic(
        make_config, kind, rng, rng.choice([20, 30, 64]), max_num_batched_tokens=budget
    )

    def same(arrival: Arrival, answer: list[int]) -> bool:
        return answer == answer_of(arrival.token_ids, arrival.num_tokens)[: len(answer)]

    outcome = serve(serving, rng, 40, vocab_size, answer_of)
    assert outcome.wrong(same) == []
    tokens = sum(len(request.output_token_ids) for _, request in outcome.requests)
    assert sum(len(output.req_ids) for output in serving.outputs) < tokens + 40 * 7


def test_drafts_that_the_scheduler_makes_up(make_config):
    """A request with one token left is padded with drafts of -1, which are nobody's token."""
    rng = random.Random(0)
    serving, answer_of, vocab_size = symbolic(make_config, "full", rng, 64)
    shared = prompt(rng, 33, vocab_size)
    first = serving.add("first", shared, max_tokens=20)
    for _ in range(3):
        serving.step()
    seen = []
    schedule = serving.scheduler.schedule

    def noting(*arguments):
        scheduled = schedule(*arguments)
        seen.append(scheduled.scheduled_spec_decode_tokens.get("second", []))
        return scheduled

    serving.scheduler.schedule = noting
    second = serving.add("second", shared[:33], max_tokens=20)
    serving.run()
    assert serving.cached_tokens["second"] == 32 and set(seen[0]) == {-1}
    assert list(first.output_token_ids) == answer_of(shared, 20)
    assert list(second.output_token_ids) == answer_of(shared, 20)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[int, ...], list[int]]:
    """What mlx-lm generates greedily, one prompt at a time, with its own caches."""
    model = tiny_model("llama")
    return {
        tuple(p): [int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=NEW_TOKENS)]
        for p in PROMPTS
    }


def speculating(make_config, answers, count: int, right: float = 0.6, **settings) -> Serving:
    """A server of the tiny Llama with drafts of which some are right."""
    config = make_config(**drafting(count, **settings))
    serving = Serving(config)
    serving.runner._proposer = Guesses(
        config, lambda token_ids, _: answers[tuple(token_ids)], right, random.Random(count)
    )
    return serving


@pytest.mark.parametrize(
    "count", [*(pytest.param(i, marks=pytest.mark.nightly) for i in range(1, 7)), 7]
)
def test_greedy_tokens_are_those_without_drafts(make_config, answers, count):
    """Alone, in a batch, and after prefix hits."""
    serving = speculating(make_config, answers, count)
    expected = list(answers.values())
    assert [serving.generate([p], max_tokens=NEW_TOKENS)[0] for p in PROMPTS] == expected
    assert len(serving.outputs) < len(PROMPTS) * NEW_TOKENS  # fewer steps than tokens
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected
    serving.add("again", PROMPTS[5], max_tokens=NEW_TOKENS)
    serving.run()
    assert serving.cached_tokens["again"] == 48


@pytest.mark.parametrize("budget", [pytest.param(16, marks=pytest.mark.nightly), 23])
def test_chunked_prefill(make_config, answers, budget):
    settings = {"max_num_batched_tokens": budget, "enable_prefix_caching": False}
    serving = speculating(make_config, answers, 4, **settings)
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == list(answers.values())


def test_preemption(make_config, answers):
    settings = {"num_gpu_blocks_override": 12, "enable_prefix_caching": False}
    serving = speculating(make_config, answers, 4, **settings)
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == list(answers.values())
    assert serving.num_preemptions > 0


def test_right_drafts_take_one_step_and_wrong_ones_cost_none(make_config, answers):
    """Each step gives one token, and one more for each draft that is right."""
    for right, steps in ((1.0, 5), (0.0, NEW_TOKENS)):
        serving = speculating(make_config, answers, 4, right)
        serving.runner._proposer._rng.randrange = lambda end: end - 1
        assert serving.generate([PROMPTS[5]], max_tokens=NEW_TOKENS) == [answers[tuple(PROMPTS[5])]]
        assert len(serving.outputs) == steps


def test_a_request_whose_logits_are_no_numbers_keeps_the_tokens_before(make_config, answers):
    serving = speculating(make_config, answers, 4, right=1.0)
    serving.runner._proposer._rng.randrange = lambda end: end - 1
    request = serving.add("r", PROMPTS[5], max_tokens=NEW_TOKENS)
    serving.step()
    run = serving.runner.decode.run

    def broken(token_ids, metadata):
        logits = run(token_ids, metadata)
        logits[2] = mx.nan
        return logits

    object.__setattr__(serving.runner.decode, "run", broken)
    serving.step()
    assert list(request.output_token_ids) == answers[tuple(PROMPTS[5])][:3]
    assert str(request.get_finished_reason()) == "error"


SAMPLING = [
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 9, "top_k": 20, "presence_penalty": 0.5, "logprobs": 3},
    {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 1},
    {"temperature": 0.0, "min_tokens": 6, "ignore_eos": False, "logprobs": 2},
]
"""Of one request each. The last one ends at a token that it may not sample in the beginning."""


@pytest.mark.nightly
def test_seeds_penalties_and_logprobs_are_those_without_drafts(make_config, answers):
    prompts = PROMPTS[-len(SAMPLING) :]
    stop = answers[tuple(prompts[-1])][1]

    def served(serving: Serving) -> list:
        requests = []
        for i, (token_ids, params) in enumerate(zip(prompts, SAMPLING, strict=True)):
            stops = {"stop_token_ids": [stop]} if "min_tokens" in params else {}
            requests.append(
                serving.add(str(i), token_ids, max_tokens=NEW_TOKENS, **params, **stops)
            )
        serving.run()
        return [list(request.output_token_ids) for request in requests]

    plain = Serving(make_config())
    expected = served(plain)
    truth = {tuple(p): tokens for p, tokens in zip(prompts, expected, strict=True)}
    serving = speculating(make_config, truth, 5)
    assert served(serving) == expected
    assert len(expected[-1]) >= 6 and len(serving.outputs) < len(plain.outputs)
    for name in ("1", "2", "3"):
        ours, theirs = logprobs(serving, name), logprobs(plain, name)
        ours = {key: rows[: len(theirs[key])] for key, rows in ours.items()}
        for key, rows in theirs.items():
            np.testing.assert_allclose(ours[key], rows, atol=1e-4)


def logprobs(serving: Serving, name: str) -> dict[str, np.ndarray]:
    """All rows of a request's log-probabilities, as vLLM's scheduler takes them."""
    parts = []
    for output in serving.outputs:
        index = output.req_id_to_index.get(name)
        if index is not None and output.logprobs is not None:
            tokens = output.sampled_token_ids[index]
            parts.append(output.logprobs.slice_request(index, len(tokens)))
    return {
        "tokens": np.concatenate([part.logprob_token_ids[:, :2] for part in parts]),
        "logprobs": np.concatenate([part.logprobs[:, :2] for part in parts]),
        "ranks": np.concatenate([part.sampled_token_ranks for part in parts]),
    }
