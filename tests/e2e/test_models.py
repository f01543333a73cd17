"""One tiny random model of each kind: the engine's greedy tokens are mlx-lm's own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer, models, pre_tokenizers
from vllm import SamplingParams

from tests.e2e import engine as e2e
from tests.tiny_models import VOCABULARY, save_checkpoint, tiny_model

NEW_TOKENS = 24
PARAMS = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
PROMPTS = [np.random.default_rng([n]).integers(0, VOCABULARY, n).tolist() for n in (5, 37, 70)]

GROWING = [np.random.default_rng([n]).integers(0, VOCABULARY, n).tolist() for n in (5, 6, 7, 37)]
"""Requests that start small and then ask for more blocks than there are."""


@dataclass(frozen=True)
class Kind:
    """A model, and what is particular of it."""

    model_type: str
    architecture: str
    caches_prefixes: bool = True
    blocks: int | None = None
    """So few that requests are preempted; None where a request never asks for another block."""

    def __str__(self) -> str:
        return self.model_type


KINDS = [
    Kind("gemma3_text", "Gemma3ForCausalLM", blocks=22),
    Kind("olmo3", "Olmo3ForCausalLM", blocks=23),
    Kind("gpt_oss", "GptOssForCausalLM", blocks=22),
    Kind("qwen3_next", "Qwen3NextForCausalLM", caches_prefixes=False),
    Kind("jamba", "JambaForCausalLM", caches_prefixes=False, blocks=9),
    Kind("falcon_h1", "FalconH1ForCausalLM", caches_prefixes=False, blocks=11),
    Kind("granitemoehybrid", "GraniteMoeHybridForCausalLM", caches_prefixes=False),
    Kind("mamba", "MambaForCausalLM", caches_prefixes=False),
]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / kind.model_type
    save_checkpoint(folder, kind.model_type, architectures=[kind.architecture])
    vocabulary = {chr(33 + i): i for i in range(VOCABULARY - 1)} | {"?!": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="module")
def generated(kind) -> Callable[[list[list[int]]], list[list[int]]]:
    """What mlx-lm generates, one prompt at a time, with its own caches."""
    model = tiny_model(kind.model_type)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        steps = [generate_step(mx.array(p), model, max_tokens=NEW_TOKENS) for p in prompts]
        return [[int(token) for token, _ in tokens] for tokens in steps]

    return generate


@pytest.fixture
def engine(folder) -> Callable:
    def make(**settings):
        defaults = {"max_model_len": 128, "kv_cache_memory_bytes": 4 << 20}
        return e2e.engine(folder, **(defaults | settings))

    return make


def test_alone_in_a_batch_and_after_prefix_hits(kind, engine, generated):
    expected = generated(PROMPTS)
    with engine() as llm:
        assert [e2e.generate(llm, [prompt], PARAMS)[0] for prompt in PROMPTS] == expected
        assert e2e.generate(llm, PROMPTS, PARAMS) == expected
        assert (e2e.num_cached_tokens(llm, PROMPTS[-1]) > 0) == kind.caches_prefixes


def test_chunked_prefill(engine, generated):
    with engine(max_num_batched_tokens=16, enable_prefix_caching=False) as llm:
        assert e2e.generate(llm, PROMPTS, PARAMS) == generated(PROMPTS)


def test_preemption(kind, engine, generated):
    if kind.blocks is None:
        pytest.skip("a request has all blocks from its beginning")
    with engine(
        max_num_batched_tokens=32,
        num_gpu_blocks_override=kind.blocks,
        enable_prefix_caching=False,
        disable_log_stats=False,
    ) as llm:
        assert e2e.generate(llm, GROWING, PARAMS) == generated(GROWING)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0


def test_compressed_pages_give_a_batch_what_they_give_its_requests_alone(kind, engine):
    if kind.model_type == "mamba":
        pytest.skip("no layer has pages")
    with engine(additional_config={"turboquant": True}, enable_prefix_caching=False) as llm:
        alone = [e2e.generate(llm, [prompt], PARAMS)[0] for prompt in PROMPTS]
        assert e2e.generate(llm, PROMPTS, PARAMS) == alone
