"""Engines with `--speculative-config`: the answers of engines without it, dense and compressed."""

import re

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.e2e import engine as e2e
from tests.near_ties import GreedyAnswer

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
LIMITS = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_batched_tokens": 64,
    "disable_log_stats": False,
}
COMPRESSED = {
    "additional_config": {
        "turboquant": True,
        "k_quant": "q8_0",
        "v_quant": "q4_0",
        "reproducible": True,
    },
}
NEAR_TIE = 0.05
"""Lead of a log-probability below which compressed keys, read in another company of rows, may tip
a token: rounding moves a code to the next one."""
ROUNDING = 1e-4
"""The same with dense pages, where nothing but the order of float32 sums differs."""
NEW_TOKENS = 60
PATTERN = [5, 17, 30, 8, 41, 22, 9]
PROMPTS = [(PATTERN * 9)[:length] + [3] * extra for length, extra in ((5, 0), (40, 2), (60, 0))]
"""What repeats itself, so that there are drafts."""


@pytest.fixture(scope="module", params=[{}, COMPRESSED], ids=["dense", "turboquant"])
def engines(request, reading_model):
    """One without speculation and one with, and by how much their tokens must be ahead."""
    near_tie = NEAR_TIE if request.param else ROUNDING
    with e2e.engine(reading_model, **LIMITS, **request.param) as plain:
        with e2e.engine(reading_model, **LIMITS, speculative_config=NGRAM, **request.param) as llm:
            yield plain, llm, near_tie


def outputs_of(llm, prompts, params):
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(given, params, use_tqdm=False)]


def answers(llm, prompts, near_tie: float) -> list[GreedyAnswer]:
    """Greedy answers and their leads."""
    found = []
    for output in outputs_of(llm, prompts, e2e.greedy(NEW_TOKENS, logprobs=2)):
        best = [sorted((s.logprob for s in at.values()), reverse=True) for at in output.logprobs]
        found.append(GreedyAnswer(output.token_ids, [b[0] - b[1] for b in best], near_tie))
    return found


def accepted(llm) -> int:
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafted = metrics["vllm:spec_decode_num_draft_tokens"].value
    right = metrics["vllm:spec_decode_num_accepted_tokens"].value
    assert 0 <= right <= drafted
    assert metrics["vllm:spec_decode_num_drafts"].value <= drafted
    return right


def test_greedy_answers_alone_in_a_batch_and_after_hits(engines):
    plain, llm, near_tie = engines
    expected = answers(plain, PROMPTS, near_tie)
    before = accepted(llm)
    for _ in range(2):
        assert expected == e2e.generate(llm, PROMPTS, e2e.greedy(NEW_TOKENS))
    for answer, prompt in zip(expected, PROMPTS, strict=True):
        assert [answer] == e2e.generate(llm, [prompt], e2e.greedy(NEW_TOKENS))
    assert accepted(llm) > before


def test_greedy_answers_of_requests_that_are_preempted(engines):
    plain, llm, near_tie = engines
    expected = answers(plain, PROMPTS, near_tie)
    params = e2e.greedy(NEW_TOKENS)
    assert expected == e2e.generate_preempted(llm, PROMPTS, params, after=9)


def test_a_stop_string_and_min_tokens(engines):
    plain, llm, near_tie = engines
    reference = plain if near_tie == ROUNDING else llm  # a tie may tip what is compressed
    [whole] = outputs_of(reference, PROMPTS[:1], e2e.greedy(24))
    stop = whole.text[len(whole.text) // 2 :][:3]
    for params in (
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop]),
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop], min_tokens=20),
    ):
        [expected], [output] = (outputs_of(e, PROMPTS[:1], params) for e in (reference, llm))
        assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)


def test_log_probabilities_of_every_token(engines):
    _, llm, _ = engines
    for output in outputs_of(llm, PROMPTS, e2e.greedy(NEW_TOKENS, logprobs=2)):
        assert len(output.logprobs) == len(output.token_ids) == NEW_TOKENS
        for token, scores in zip(output.token_ids, output.logprobs, strict=True):
            assert scores[token].rank == 1


def test_structured_outputs_beside_a_plain_request(engines):
    plain, llm, near_tie = engines
    constrained = SamplingParams(
        temperature=0,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(regex=r"(ab){9}-\d{4}"),
    )
    [expected] = answers(plain, PROMPTS[1:2], near_tie)
    for _ in range(2):
        first, second = outputs_of(
            llm, [PROMPTS[0], PROMPTS[1]], [constrained, e2e.greedy(NEW_TOKENS)]
        )
        assert re.fullmatch(r"(ab){9}-\d{4}", first.text), first.text
        assert expected == list(second.token_ids)
