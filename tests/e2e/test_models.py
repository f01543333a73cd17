"""One tiny random model of each kind, with dense and with compressed pages.

The expected greedy tokens are mlx-lm's own for dense pages, and for compressed ones those that a
request gets alone, whose log-probabilities are compared with what mlx-lm makes of keys and values
that went through the codec.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from mlx_lm_reference import reference_logits
from vllm import LLM, SamplingParams

from tests.e2e import engine as e2e
from tests.e2e.kinds import KINDS, Kind
from tests.near_ties import GreedyAnswer
from tests.tiny_models import VOCABULARY
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.groups import AttentionGroup

pytestmark = pytest.mark.engine

CHUNK = 32
MAX_MODEL_LEN = 96
NEW_TOKENS = 16
LIMITS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": CHUNK,
    "kv_cache_memory_bytes": 4 << 20,
    "max_logprobs": VOCABULARY,
    "disable_log_stats": False,
}
TURBOQUANT = {"turboquant": True, "k_quant": "q8_0", "v_quant": "q8_0", "reproducible": True}

NEAR_TIE = 0.05
"""With compressed pages, a token may be another one if its log-probability is less than this ahead
of the next best: rounding by the shape of a batch may tip a code over."""

ROUNDING = 1e-4
"""Largest difference of log-probabilities that are computed in another order. It may tip a code
over, which is worth a part of what the codec does to all of them."""


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, VOCABULARY - 1, length).tolist()


SHORT, WHOLE, LONG = prompt(5), prompt(CHUNK - 1), prompt(2 * CHUNK + 6)
PROMPTS = [SHORT, LONG, WHOLE]


@dataclass(frozen=True)
class Case:
    """One engine."""

    kind: Kind
    compressed: bool

    def __str__(self) -> str:
        return f"{self.kind}-{'turboquant' if self.compressed else 'dense'}"


CASES = [
    Case(kind, compressed)
    for kind in KINDS
    for compressed in (False, True)
    if not (compressed and kind.no_turboquant)
]

COMPRESSED = ("llama", "qwen3-heads of 128", "gemma3_text", "jamba")
"""Kinds with compressed pages whose tests are not left to the night: plain, with levels, windows,
and recurrent states."""

DENSE = (
    *("llama", "gemma3_text", "gpt_oss", "qwen3_next", "jamba", "gemma2", "gemma4_shared"),
    *("minicpm3", "deepseek_v32"),
)
"""The same with dense pages: plain, windows, windows with sinks, a gated delta net, Mamba, one
request at a time, layers of two sizes of which some share, keys and values of unequal sizes, and
two caches in a layer."""

SCARCE = ["llama", "gemma3_text", "jamba"]
"""The same for kinds that run short of blocks: full attention, windows, states in the blocks of
pages."""


def nightly_unless(by_day: bool) -> list[pytest.MarkDecorator]:
    return [] if by_day else [pytest.mark.nightly]


@dataclass
class Answer:
    """Greedy tokens of one prompt."""

    tokens: list[int]
    logprobs: np.ndarray
    """[len(tokens), vocabulary]"""


class Served:
    """A running engine, and what it should say."""

    def __init__(self, case: Case, llm: LLM, model: nn.Module):
        self.kind, self.llm = case.kind, llm
        self._compressed, self._model = case.compressed, model
        self._expected: dict[tuple[int, ...], list[int] | GreedyAnswer] = {}

    def generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Tokens of prompts submitted at once, with what the prefix cache has of them."""
        return e2e.generate(self.llm, prompts, greedy())

    def scored(self, prompt: list[int]) -> Answer:
        """The answer to one prompt."""
        [output] = self.llm.generate(
            [{"prompt_token_ids": prompt}], greedy(logprobs=VOCABULARY), use_tqdm=False
        )
        [completion] = output.outputs
        scores = [[step[t].logprob for t in range(VOCABULARY)] for step in completion.logprobs]
        return Answer(list(completion.token_ids), np.array(scores))

    def expected(self, prompt: list[int]) -> list[int] | GreedyAnswer:
        """Tokens of one prompt; of compressed pages up to near ties."""
        if tuple(prompt) not in self._expected:
            self._expected[tuple(prompt)] = (
                self._alone(prompt) if self._compressed else mlx_lm_tokens(self._model, prompt)
            )
        return self._expected[tuple(prompt)]

    def expected_of(self, prompts: Sequence[list[int]]) -> list[list[int] | GreedyAnswer]:
        """Tokens of each prompt; nothing is in the prefix cache afterwards."""
        expected = [self.expected(prompt) for prompt in prompts]
        self.llm.reset_prefix_cache()
        return expected

    def mlx_lm_logprobs(self, prompt: list[int], answer: Answer, through_codec: bool) -> np.ndarray:
        """[len(tokens), vocabulary] of the answer's tokens, on mlx-lm's own caches."""
        [backends] = self.llm.collective_rpc(lambda worker: worker.model_pages.backends)
        sequence = prompt + answer.tokens[:-1]
        logits, _ = reference_logits(self._model, [sequence], backends if through_codec else [])
        logits = logits[len(prompt) - 1 :]
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def _alone(self, prompt: list[int]) -> GreedyAnswer:
        self.llm.reset_prefix_cache()
        answer = self.scored(prompt)
        best = np.sort(answer.logprobs, axis=-1)
        return GreedyAnswer(answer.tokens, best[:, -1] - best[:, -2], NEAR_TIE)


def mlx_lm_tokens(model: nn.Module, prompt: list[int]) -> list[int]:
    """What mlx-lm generates greedily."""
    return [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)]


def greedy(**more) -> SamplingParams:
    return e2e.greedy(NEW_TOKENS, **more)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            case,
            id=str(case),
            marks=nightly_unless(str(case.kind) in (COMPRESSED if case.compressed else DENSE)),
        )
        for case in CASES
    ],
)
def served(request, tmp_path_factory) -> Iterator[Served]:
    case = request.param
    folder = case.kind.save(tmp_path_factory.mktemp("models") / case.kind.name)
    settings = {"additional_config": TURBOQUANT} if case.compressed else {}
    with e2e.engine(folder, **LIMITS, **settings) as llm:
        yield Served(case, llm, load_model(folder)[0])


def test_alone(served):
    """Prompts of one chunk."""
    for given in (SHORT, WHOLE):
        expected = served.expected_of([given])
        assert served.generate([given]) == expected


def test_chunked_prefill(served):
    expected = served.expected_of([LONG])
    assert served.generate([LONG]) == expected


def test_a_batch_of_three_unequal_lengths(served):
    expected = served.expected_of(PROMPTS)
    assert served.generate(PROMPTS) == expected


def test_prefix_caching(served):
    """A prompt again, beside one that has its beginning; or no prefix is cached."""
    prompts = [LONG, LONG[:-16] + prompt(24, seed=1)]
    expected = served.expected_of(prompts)
    served.generate([LONG])
    assert (e2e.num_cached_tokens(served.llm, LONG) >= CHUNK) == served.kind.caches_prefixes
    assert served.generate(prompts) == expected


def test_preemption_of_all_that_run(served):
    """As vLLM does when it resets the prefix cache under running requests."""
    expected, before = served.expected_of(PROMPTS), e2e.num_preemptions(served.llm)
    found = e2e.generate_preempted(served.llm, PROMPTS, greedy(), after=9)
    assert found == expected
    assert e2e.num_preemptions(served.llm) > before


def test_log_probabilities(served):
    """Alone: mlx-lm's, within what the codec does to them."""
    errors, losses = [], []
    for given in PROMPTS:
        served.llm.reset_prefix_cache()
        answer = served.scored(given)
        expected = served.mlx_lm_logprobs(given, answer, through_codec=True)
        dense = served.mlx_lm_logprobs(given, answer, through_codec=False)
        errors += np.abs(answer.logprobs - expected).max(axis=-1).tolist()
        losses += np.abs(dense - expected).max(axis=-1).tolist()
    assert max(errors) < ROUNDING + max(losses)
    assert np.median(errors) < ROUNDING + np.median(losses) / 2


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=str(kind), marks=nightly_unless(str(kind) in SCARCE))
        for kind in KINDS
        if kind.scarce_blocks
    ],
)
def test_preemption_for_want_of_blocks(kind, tmp_path):
    """Requests that start within a block, and soon ask for more than there are."""
    folder = kind.save(tmp_path)
    model, _ = load_model(folder)
    pool = {"num_gpu_blocks_override": kind.scarce_blocks}
    with e2e.engine(folder, **LIMITS, **pool) as llm:
        [groups] = llm.collective_rpc(lambda worker: worker.kv_cache.groups)
        block_size = max(group.block_size for group in groups if isinstance(group, AttentionGroup))
        prompts = [prompt(block_size - 1 - i) for i in range(4)]
        expected = [mlx_lm_tokens(model, given) for given in prompts]
        assert e2e.generate(llm, prompts, greedy()) == expected
        assert e2e.num_preemptions(llm) > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.no_turboquant], ids=str)
def test_turboquant_is_refused_with_the_reason(kind, tmp_path):
    with pytest.raises(UserError) as refusal:
        with e2e.engine(kind.save(tmp_path), additional_config=TURBOQUANT, **LIMITS):
            pass
    assert kind.no_turboquant in str(refusal.value)
