"""Recurrent states of cached prefixes: a request that finds one goes on as if it had read it all.

A tiny model of every kind of recurrent layer serves conversations whose turns begin with all that
was said before, with and without prefix caching. Tokens have to be equal, and their
log-probabilities within `ROUNDING`: a state that is a token off changes them by far more. Prompts
are cut into other chunks where prefixes are cached, so that they are not equal to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.serving import Serving
from tests.tiny_models import VOCABULARY, save_checkpoint
from vllm_metal.kv_cache.groups import StateGroup

ROUNDING = 1e-5
"""Of log-probabilities, and in addition of their size."""
TURNS, NEW_TOKENS = 3, 6
SYSTEM_PROMPT = np.random.default_rng(0).integers(0, VOCABULARY - 1, 150).tolist()


@dataclass(frozen=True)
class Kind:
    """A model with recurrent layers."""

    name: str
    architecture: str
    inside: bool = True
    """Whether prefixes are found inside of blocks, where these are large."""
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    """Of the tiny model's settings."""

    def __str__(self) -> str:
        return self.name


KINDS = [
    Kind("qwen3_next", "Qwen3NextForCausalLM"),  # gated delta net
    Kind("olmo_hybrid", "OlmoHybridForCausalLM"),
    Kind("jamba", "JambaForCausalLM"),  # Mamba
    Kind("granitemoehybrid", "GraniteMoeHybridForCausalLM"),  # Mamba 2
    Kind("falcon_h1", "FalconH1ForCausalLM"),  # Mamba 2 beside attention, in every layer
    Kind("nemotron_h", "NemotronHForCausalLM"),
    Kind("lfm2", "Lfm2ForCausalLM"),  # short convolutions
    Kind("recurrent_gemma", "RecurrentGemmaForCausalLM", inside=False),  # RG-LRU and windows
    Kind("baichuan_m1", "BaichuanM1ForCausalLM", inside=False),  # convolutions and windows
    Kind("mamba", "MambaForCausalLM", inside=False),  # no attention
    Kind("mamba2", "Mamba2ForCausalLM", inside=False, changes={"expand": 1}),
    Kind("rwkv7", "RWKV7ForCausalLM", inside=False),
]
BY_DAY = {"lfm2"}
KINDS_AND_BLOCKS = [
    pytest.param(
        kind,
        block_size,
        id=f"{kind}-{block_size}",
        marks=[] if kind.name in BY_DAY and block_size == 64 else pytest.mark.nightly,
    )
    for kind in KINDS
    for block_size in (16, 64)
]


@dataclass
class Said:
    """What a server answered."""

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the answers' tokens."""
    cached: list[int] = field(default_factory=list)
    """Prompt tokens that came from the prefix cache."""
    prompts: list[list[int]] = field(default_factory=list)


def converse(serving: Serving, **params: Any) -> Said:
    """Two conversations in step with each other, and a question that is asked twice."""
    said = Said()
    rng = np.random.default_rng(1)
    contexts = [SYSTEM_PROMPT[:100], SYSTEM_PROMPT[:37]]
    for turn in range(TURNS):
        for context in contexts:
            context += rng.integers(0, VOCABULARY - 1, 11 + 20 * turn).tolist()
        for context, answer in zip(contexts, ask(serving, contexts, said, params), strict=True):
            context += answer
    ask(serving, [contexts[0], contexts[0]], said, params)
    return said


def ask(
    serving: Serving, prompts: list[list[int]], said: Said, params: dict[str, Any]
) -> list[list[int]]:
    """The answers to prompts that come at once, which are also added to `said`."""
    first, before = len(serving.outputs), len(said.prompts)
    names = [f"{before + i}" for i in range(len(prompts))]
    requests = [
        serving.add(name, prompt, max_tokens=NEW_TOKENS, **params)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    serving.run()
    answers = [list(request.output_token_ids) for request in requests]
    said.tokens += answers
    said.prompts += [list(prompt) for prompt in prompts]
    said.cached += [serving.cached_tokens[name] for name in names]
    for name in names:
        for output in serving.outputs[first:]:
            row = output.req_id_to_index.get(name)
            if row is not None and output.logprobs and output.sampled_token_ids[row]:
                said.logprobs.append(float(output.logprobs.logprobs[row][0]))
    return answers


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[Kind], str]:
    """Gives the folder of a kind's model."""
    folders: dict[Kind, str] = {}

    def folder_of(kind: Kind) -> str:
        if kind not in folders:
            folder = tmp_path_factory.mktemp("models") / kind.name
            architectures = [kind.architecture]
            save_checkpoint(folder, kind.name, architectures=architectures, **kind.changes)
            folders[kind] = str(folder)
        return folders[kind]

    return folder_of


@pytest.mark.parametrize(("kind", "block_size"), KINDS_AND_BLOCKS)
def test_an_answer_after_a_cached_prefix_is_that_without(
    make_config, checkpoints, kind, block_size
):
    def serving(**settings) -> Serving:
        defaults = {"model": checkpoints(kind), "max_model_len": 512, "block_size": block_size}
        return Serving(make_config(**(defaults | {"enable_prefix_caching": True} | settings)))

    alone = converse(serving(enable_prefix_caching=False, async_scheduling=False), logprobs=1)
    assert not any(alone.cached) and len(alone.logprobs) == len(alone.tokens) * NEW_TOKENS

    synchronous = serving(async_scheduling=False)
    found = converse(synchronous, logprobs=1)
    assert found.tokens == alone.tokens
    np.testing.assert_allclose(found.logprobs, alone.logprobs, ROUNDING, ROUNDING)
    check_what_was_cached(synchronous, found)
    blocks = {group.block_size for group in synchronous.runner.kv_cache.groups}
    inside = synchronous.worker.model_pages.match_tokens < min(blocks)
    assert inside == (kind.inside and block_size == 64)

    chunked = serving(max_num_batched_tokens=block_size + 24)  # and asynchronous
    told = converse(chunked)
    assert told.tokens == alone.tokens
    check_what_was_cached(chunked, told)


def check_what_was_cached(serving: Serving, said: Said) -> None:
    """Each turn finds all of the turn before, down to where prefixes are found."""
    groups = serving.runner.kv_cache.groups
    states = {group.block_size for group in groups if isinstance(group, StateGroup)}
    assert states == {min(group.block_size for group in groups)}
    match_tokens = serving.worker.model_pages.match_tokens
    for earlier, cached in zip(said.prompts, said.cached[2:-2], strict=False):
        assert cached == (len(earlier) - 1) // match_tokens * match_tokens
    assert any(said.cached)
