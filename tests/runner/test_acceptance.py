"""What requests gain with drafts: the tokens, and the distribution, that they have without."""

import random

import numpy as np
import pytest
import torch

from tests.scheduler_outputs import Continued, new_request, scheduler_output
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner.acceptance import greedy_gains, sampled_gains
from vllm_metal.runner.request_batch import RequestBatch
from vllm_metal.runner.sampler import TorchSampler
from vllm_metal.runner.segments import Kind, Segment


def segment(name: str, drafts: tuple[int, ...] = (), row: int = 0, first: int = 0) -> Segment:
    return Segment(name, row, first, 1 + len(drafts), Kind.DECODE, True, drafts)


@pytest.mark.parametrize(
    ("drafts", "tokens", "gained"),
    [
        ((), [5], [5]),
        ((6, 7), [5, 6, 7], [5]),  # the first draft is wrong, so nothing after it counts
        ((5, 7), [5, 6, 7], [5, 6]),
        ((5, 6), [5, 6, 7], [5, 6, 7]),  # all are right, and the last position gives one more
        ((5, 5, 6), [5, 6, 6, 7], [5, 6]),
    ],
)
def test_tokens_count_up_to_the_first_wrong_draft(drafts, tokens, gained):
    gains = greedy_gains([segment("a", drafts)], tokens, [True] * len(tokens))
    assert gains.tokens == {"a": gained} and not gains.with_nans


def test_each_request_has_its_own_positions():
    segments = [segment("a"), segment("b", (1, 2)), segment("c", (4,))]
    gains = greedy_gains(segments, [9, 1, 3, 8, 4, 6], [True] * 6)
    assert gains.tokens == {"a": [9], "b": [1, 3], "c": [4, 6]}


def test_positions_that_count_must_be_finite():
    """A request keeps what came before; what a wrong draft leads to is nobody's."""
    segments = [segment("a", (1, 2)), segment("b", (7, 2))]
    finite = [True, False, True, True, False, False]
    gains = greedy_gains(segments, [1, 2, 3, 1, 2, 3], finite)
    assert gains.tokens == {"a": [1], "b": [1]} and gains.with_nans == ["a"]


REQUESTS, VOCABULARY, DRAWS = 200, 5, 20_000


def running(make_config, **params) -> RequestBatch:
    """Requests that have just computed a prompt of one token, and go on."""
    names = [str(i) for i in range(REQUESTS)]
    config = make_config(max_num_seqs=REQUESTS, max_model_len=4 * DRAWS // REQUESTS)
    batch = RequestBatch(config, [BlockTableSize(16, 8)])
    new = [new_request(n, [i % VOCABULARY], [1], **params) for i, n in enumerate(names)]
    batch.update(scheduler_output(new))
    return batch


def test_the_distribution_is_that_without_drafts(make_config):
    """Pearson's test over 20,000 tokens: each token's successors have the model's probabilities.

    Drafts are now likely, now unlikely. With 20 degrees of freedom, a sum over 65 has a probability
    of one in a million.
    """
    torch.manual_seed(0)
    rng, batch = random.Random(0), running(make_config, temperature=1.0)
    batch.update(scheduler_output(continued=[Continued(n, 1) for n in batch.requests]))
    model = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits_after = torch.full((VOCABULARY, batch.rows.vocab_size), -torch.inf)
    logits_after[:, :VOCABULARY] = model
    newest = {name: r.prompt_token_ids[-1] for name, r in batch.requests.items()}
    counts, steps = np.zeros((VOCABULARY, VOCABULARY)), 0
    while counts.sum() < DRAWS:
        steps += 1
        segments = []
        for name, row in batch.rows.req_id_to_index.items():
            drafts = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(4)))
            segments.append(segment(name, drafts, row))
        lengths = np.array([s.length for s in segments])
        first_rows = np.cumsum(lengths) - lengths
        before = [token for s in segments for token in (newest[s.req_id], *s.drafts)]
        logits, finite = logits_after[before], np.ones(len(before), bool)
        gains = sampled_gains(
            segments, first_rows, logits, finite, batch, TorchSampler("raw_logprobs")
        )
        for name, tokens in gains.tokens.items():
            for token in tokens:
                counts[newest[name], token] += 1
                newest[name] = token
    expected = counts.sum(axis=1, keepdims=True) * model.softmax(dim=-1).numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 65
    assert counts.sum() > 1.15 * REQUESTS * steps  # some drafts were confirmed


def test_logprobs_are_in_the_order_of_requests(make_config):
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
    names = ("a", "b", "c")
    batch.update(
        scheduler_output([new_request(n, [1], [i + 1], logprobs=0) for i, n in enumerate(names)])
    )
    segments = [segment("c", (4, 5), row=2), segment("a", (2,), row=0)]  # b does not sample
    first_rows = np.array([0, 2, 3])
    most_likely = [2, 3, 0, 4, 5, 6]
    logits = torch.zeros(6, batch.rows.vocab_size)
    logits[range(6), most_likely] = torch.arange(1.0, 7.0)
    expected = logits.log_softmax(dim=-1)[range(6), most_likely]
    gains = sampled_gains(
        segments, first_rows, logits, np.ones(6, bool), batch, TorchSampler("raw_logprobs")
    )
    assert gains.tokens == {"c": [4, 5, 6], "a": [2, 3]}
    assert gains.logprobs.cu_num_generated_tokens == [0, 2, 2, 5]
    of_c = gains.logprobs.slice_request(2, 3)
    assert of_c.logprob_token_ids[:, 0].tolist() == [4, 5, 6]
    np.testing.assert_allclose(of_c.logprobs[:, 0], expected[3:], rtol=1e-6)
    assert gains.logprobs.slice_request(0, 2).logprob_token_ids[:, 0].tolist() == [2, 3]


def test_a_row_that_is_not_finite_is_not_sampled(make_config):
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
    batch.update(scheduler_output([new_request("a", [1], [1], logprobs=0)]))
    logits = torch.zeros(3, batch.rows.vocab_size)
    logits[range(3), [4, 5, 6]] = 9
    for broken, gained in ((0, []), (1, [4]), (2, [4, 5])):
        finite = np.arange(3) != broken
        sampler, first = TorchSampler("raw_logprobs"), np.array([0])
        gains = sampled_gains([segment("a", (4, 5))], first, logits.clone(), finite, batch, sampler)
        assert gains.tokens == {"a": gained} and gains.with_nans == ["a"]


def test_a_confirmed_draft_counts_towards_the_least_number_of_tokens(make_config):
    """After it the request may sample the token that ends it."""
    batch = RequestBatch(make_config(), [BlockTableSize(16, 8)])
    batch.update(scheduler_output([new_request("a", [1], [1], min_tokens=1, stop_token_ids=[5])]))
    logits = torch.zeros(2, batch.rows.vocab_size)
    logits[range(2), [4, 5]] = 9
    sampler, finite = TorchSampler("raw_logprobs"), np.ones(2, bool)
    gains = sampled_gains([segment("a", (4,))], np.array([0]), logits, finite, batch, sampler)
    assert gains.tokens == {"a": [4, 5]}
