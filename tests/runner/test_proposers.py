"""Drafts of n-grams are vLLM's own, and no request gets more than it can use."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.scheduler_outputs import new_request, scheduler_output
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner.proposers import NGrams, SuffixTrees, after_n_gram, make_proposer
from vllm_metal.runner.request_batch import RequestBatch

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 3,
}


def test_what_followed_the_longest_n_gram_at_its_first_place():
    tokens = np.array([7, 1, 2, 3, 8, 9, 2, 3, 6, 1, 2, 3])
    assert after_n_gram(tokens, 1, 3, 4) == [8, 9, 2, 3]  # 1 2 3
    assert after_n_gram(tokens, 1, 2, 2) == [8, 9]  # 2 3, which stands at two places
    assert after_n_gram(tokens, 4, 5, 4) == []
    assert after_n_gram(tokens, 1, 3, 0) == []
    assert after_n_gram(np.array([5]), 1, 3, 4) == []
    assert after_n_gram(np.array([5, 5, 5]), 1, 3, 4) == [5]  # the places may overlap


@pytest.fixture
def vllm_drafts(monkeypatch):
    """vLLM's own search, which numba would compile."""
    numba = ModuleType("numba")

    def as_it_is(*functions, **_):
        return functions[0] if functions else as_it_is

    numba.jit = numba.njit = as_it_is
    numba.prange = range
    numba.get_num_threads = numba.set_num_threads = lambda *_: 1
    monkeypatch.setitem(sys.modules, "numba", numba)
    name = "vllm.v1.spec_decode.ngram_proposer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

    yield _find_longest_matched_ngram_and_propose_tokens
    sys.modules.pop(name, None)


def test_n_grams_are_those_of_vllm(vllm_drafts):
    rng, found = np.random.default_rng(0), 0
    for _ in range(2000):
        tokens = rng.integers(0, rng.integers(1, 5), rng.integers(1, 40)).astype(np.int32)
        shortest = int(rng.integers(1, 5))
        longest, most = shortest + int(rng.integers(0, 4)), int(rng.integers(1, 8))
        max_model_len = len(tokens) + int(rng.integers(0, 10))
        expected = vllm_drafts(tokens, shortest, longest, max_model_len, most).tolist()
        room = min(most, max_model_len - len(tokens))
        assert after_n_gram(tokens, shortest, longest, room) == expected
        found += bool(expected)
    assert found > 1000


def batch_of(config, prompts, **params) -> RequestBatch:
    batch = RequestBatch(config, [BlockTableSize(16, 8)])
    new = [new_request(name, p, [i + 1], **params) for i, (name, p) in enumerate(prompts.items())]
    batch.update(scheduler_output(new))
    return batch


def test_drafts_of_a_batch(make_config):
    """A request that has not sampled gets none; nor does one without a repetition."""
    config = make_config(speculative_config=NGRAM)
    prompts = {"a": [1, 2, 3, 4, 1], "b": [1, 2, 1, 2, 1], "c": [1, 2, 3, 4, 5]}
    batch = batch_of(config, prompts, max_tokens=50)
    for name, token in (("a", 2), ("c", 6)):
        batch.append(name, token)
    proposer = make_proposer(config)
    assert isinstance(proposer, NGrams)
    assert proposer.propose(batch, [[2], [], [6]]) == [[3, 4, 1, 2], [], []]


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({"max_tokens": 1}, 0),
        ({"max_tokens": 3}, 1),
        ({"max_tokens": 4}, 2),
        ({"max_tokens": None}, 4),
        ({"max_tokens": 50, "thinking_token_budget": 9}, 0),
    ],
)
def test_no_more_drafts_than_a_request_can_use(make_config, params, count):
    """One token has been generated, and the next step gives one without a draft."""
    config = make_config(speculative_config=NGRAM)
    batch = batch_of(config, {"a": [1, 2, 3, 4, 5, 1]}, **params)
    batch.append("a", 2)
    [drafts] = make_proposer(config).propose(batch, [[2]])
    assert drafts == [3, 4, 5, 1][:count]


def test_no_draft_lies_behind_the_longest_request(make_config):
    config = make_config(speculative_config=NGRAM, max_model_len=16)
    batch = batch_of(config, {"a": [1, 2, 3, 4] * 3 + [1]}, max_tokens=50)
    batch.append("a", 2)
    assert make_proposer(config).propose(batch, [[2]]) == [[3, 4]]


def test_without_speculation_nothing_is_proposed(make_config):
    assert make_proposer(make_config()) is None


def test_suffix_trees_are_vllms(make_config, monkeypatch):
    """With a stand-in for the package that has them."""

    class Trees:
        active_requests: set[str] = set()
        cached_requests: set[str] = set()

        def __init__(self, max_tree_depth, max_cached_requests):
            self.started, self.responses = {}, []

        def start_request(self, name, prompt):
            self.started[name] = list(prompt)

        def add_active_response(self, name, tokens):
            self.responses.append((name, tokens))

        def speculate(self, name, pattern, max_spec_tokens, **_):
            return SimpleNamespace(token_ids=[int(pattern[-1]) + 1] * max_spec_tokens)

    package, module = ModuleType("arctic_inference"), ModuleType("suffix_decoding")
    module.SuffixDecodingCache = Trees
    monkeypatch.setitem(sys.modules, "arctic_inference", package)
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", module)
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
    config = make_config(speculative_config={"method": "suffix", "num_speculative_tokens": 3})
    batch = batch_of(config, {"a": [1, 2], "b": [3, 4]}, max_tokens=50)
    batch.append("b", 5)
    proposer = make_proposer(config)
    assert isinstance(proposer, SuffixTrees)
    assert proposer.propose(batch, [[], [5]]) == [[], [6, 6, 6]]
    assert proposer._trees.suffix_cache.started == {"b": [3, 4]}
