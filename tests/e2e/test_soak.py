"""A busy server gives every request the tokens that it gets alone, for every kind of model.

Requests share prefixes, come in the middle of others' steps, are cut into chunks, preempted for
want of blocks, aborted, and lose the prefix cache. Their answers are compared with those of a
server that does nothing else. `test_scheduling.py` has the same traffic over symbolic pages.

`benchmarks/results/soak.txt` is what the whole soak writes, each kind with both ways of scheduling:

    SOAK_RESULT=benchmarks/results/soak.txt pytest -m nightly tests/e2e/test_soak.py
"""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from tests.e2e.kinds import KINDS, Kind
from tests.expert_ties import expert_leads
from tests.near_ties import GreedyAnswer
from tests.serving import Serving
from tests.tiny_models import VOCABULARY
from tests.traffic import LONGEST_ANSWER, LONGEST_PROMPT, Arrival, Outcome, serve
from vllm_metal.machine.provenance import provenance

pytestmark = pytest.mark.nightly

MAX_MODEL_LEN = LONGEST_PROMPT + LONGEST_ANSWER
RESULT = os.environ.get("SOAK_RESULT")
"""The file for the summary, if each kind is to have both ways of scheduling."""
REQUESTS = 32 if RESULT else 28
"""Of each case: more than 2,000 that are not aborted in the whole soak, and 1,000 by night."""
CLIENTS = 16
TURBOQUANT = {"turboquant": True, "k_quant": "q8_0", "v_quant": "q8_0", "reproducible": True}
NEAR_TIE = {False: 1e-4, True: 0.05}
"""By whether pages are compressed: a token may be another one if its log-probability is less than
this ahead of the second best. The product of one row is rounded otherwise than that of many, and
may then tip a code over. What follows such a token is not compared."""
EXPERT_TIE = 0.02
"""The same of compressed pages where the lead of the last chosen expert, in what the router
compares, is less than this: a code that tips over may change which expert computes the token."""

CASES = [
    (kind, compressed, async_scheduling)
    for i, kind in enumerate(KINDS)
    for compressed in (False, True)
    for async_scheduling in (False, True)
    if kind.scarce_blocks and not (compressed and kind.no_turboquant)
    if RESULT or async_scheduling == ((i + compressed) % 2 == 0)
]
"""Each kind dense and compressed. By night one of the two has asynchronous scheduling, and both
have both ways in the whole soak. Models with nothing but recurrent states are left out: they share
and lack no blocks, and `tests/serving.py` has no scheduler for them (`test_models.py` has an
engine)."""


class Alone:
    """A server that has one request at a time, and remembers their answers.

    Args:
        serving: the server.
        compressed: whether its pages are.
        model: mlx-lm's own, for how close its experts are.
    """

    def __init__(self, serving: Serving, compressed: bool, model: nn.Module):
        self._serving, self._compressed, self._model = serving, compressed, model
        self._answers: dict[tuple[int, ...], GreedyAnswer] = {}

    def tokens(self, token_ids: list[int], num_tokens: int) -> list[int]:
        return self._answer(token_ids).tokens[:num_tokens]

    def gives(self, arrival: Arrival, tokens: list[int]) -> bool:
        """Whether these tokens are, or begin, the answer to a request, up to a near tie."""
        answer = self._answer(arrival.token_ids)
        return answer == tokens or self._parts_at_an_expert_tie(arrival, answer.tokens, tokens)

    def _parts_at_an_expert_tie(
        self, arrival: Arrival, expected: list[int], tokens: list[int]
    ) -> bool:
        pairs = zip(expected, tokens, strict=False)
        parting = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        if not self._compressed or parting is None:
            return False
        leads = expert_leads(self._model, arrival.token_ids + expected[:parting])
        return leads[-1] < EXPERT_TIE

    def _answer(self, token_ids: list[int]) -> GreedyAnswer:
        key = tuple(token_ids)
        if key not in self._answers:
            first = len(self._serving.outputs)
            [tokens] = self._serving.generate([token_ids], max_tokens=LONGEST_ANSWER, logprobs=2)
            scores = [output.logprobs for output in self._serving.outputs[first:]]
            leads = [s.logprobs[0][1] - s.logprobs[0][2] for s in scores if s is not None]
            self._answers[key] = GreedyAnswer(tokens, leads, NEAR_TIE[self._compressed])
        return self._answers[key]


class Tally:
    """What all cases came to."""

    def __init__(self):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
        self._provenance = provenance("vllm", "mlx", "mlx-lm") | {"commit": commit.stdout.strip()}
        self._lines: list[str] = []
        self._outcomes: list[tuple[bool, Outcome, int]] = []

    def count(self, case: str, compressed: bool, outcome: Outcome, wrong: int) -> None:
        """Takes the requests of a finished case, and how many of their answers are wrong."""
        self._lines.append(f"{case}: {outcome}, {wrong} wrong")
        self._outcomes.append((compressed, outcome, wrong))
        print(f"soak: {self._lines[-1]}")

    def __str__(self) -> str:
        sums = [self._sum(compressed) for compressed in (False, True)]
        finished = f"{len(self._outcomes)} of {len(CASES)} cases ran to their end."
        return "\n".join(
            [f"{key}: {value}" for key, value in self._provenance.items()]
            + [*sums, finished, "", *self._lines]
        )

    def _sum(self, compressed: bool) -> str:
        found = [(outcome, wrong) for c, outcome, wrong in self._outcomes if c == compressed]
        requests = sum(len(outcome.requests) for outcome, _ in found)
        aborted = sum(outcome.aborts for outcome, _ in found)
        return (
            f"{'compressed' if compressed else 'dense'}: {requests - aborted} whole answers, "
            f"{aborted} of aborted requests as far as they came, "
            f"{sum(outcome.preemptions for outcome, _ in found)} preemptions, "
            f"{sum(outcome.resets for outcome, _ in found)} resets of the prefix cache; "
            f"{sum(wrong for _, wrong in found)} wrong"
        )


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Counts the cases of this process; `SOAK_RESULT` is written when they are through."""
    counted = Tally()
    yield counted
    if RESULT:
        assert "PYTEST_XDIST_WORKER" not in os.environ, "SOAK_RESULT is for one process"
        Path(RESULT).write_text(f"{counted}\n")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Gives the folder of a kind's model."""
    folders = {}

    def folder_of(kind: Kind):
        if kind not in folders:
            folders[kind] = kind.save(tmp_path_factory.mktemp("models") / str(len(folders)))
        return folders[kind]

    return folder_of


@pytest.mark.parametrize(("kind", "compressed", "async_scheduling"), CASES, ids=str)
def test_every_answer_is_that_of_the_request_alone(
    make_config, checkpoints, tally, kind, compressed, async_scheduling
):
    common = {
        "model": str(checkpoints(kind)),
        "skip_tokenizer_init": False,
        "max_model_len": MAX_MODEL_LEN,
        "additional_config": TURBOQUANT if compressed else {},
    }
    alone = Alone(
        Serving(make_config(**common, enable_prefix_caching=False, async_scheduling=False)),
        compressed,
        load_model(checkpoints(kind), lazy=True)[0],
    )
    rng = random.Random(f"{kind} {compressed} {async_scheduling}")
    busy = Serving(
        make_config(
            **common,
            async_scheduling=async_scheduling,
            enable_prefix_caching=kind.caches_prefixes,
            max_num_seqs=CLIENTS,
            max_num_batched_tokens=rng.choice([23, 32, 48]),
            num_gpu_blocks_override=kind.scarce_blocks and 2 * kind.scarce_blocks,
        )
    )
    outcome = serve(busy, rng, REQUESTS, VOCABULARY, alone.tokens)
    wrong = outcome.wrong(alone.gives)
    case = f"{kind}, {'compressed' if compressed else 'dense'}"
    case += f", {'async' if async_scheduling else 'sync'}"
    tally.count(case, compressed, outcome, len(wrong))
    assert wrong == []
