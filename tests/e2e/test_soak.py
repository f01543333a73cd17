"""A busy server gives every request the tokens that it gets alone, for every kind of model.

Requests share prefixes, come in the middle of others' steps, are cut into chunks, preempted for
want of blocks, aborted, and lose the prefix cache. Their answers are compared with those of a
server that does nothing else. `test_scheduling.py` has the same traffic over symbolic pages.
"""

import os
import random

import pytest

from tests.e2e.kinds import KINDS, Kind
from tests.near_ties import GreedyAnswer
from tests.serving import Serving
from tests.tiny_models import VOCABULARY
from tests.traffic import LONGEST_ANSWER, LONGEST_PROMPT, Arrival, serve

pytestmark = pytest.mark.nightly

MAX_MODEL_LEN = LONGEST_PROMPT + LONGEST_ANSWER
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "28"))
"""Of each case; all cases together have more than 1,000."""
CLIENTS = 16
TURBOQUANT = {"turboquant": True, "k_quant": "q8_0", "v_quant": "q8_0", "reproducible": True}
NEAR_TIE = {False: 1e-4, True: 0.05}
"""By whether pages are compressed: a token may be another one if its log-probability is less than
this ahead of the second best. The product of one row is rounded otherwise than that of many, and
may then tip a code over. What follows such a token is not compared."""

CASES = [
    (kind, compressed, (i + compressed) % 2 == 0)
    for i, kind in enumerate(KINDS)
    for compressed in (False, True)
    if kind.scarce_blocks and not (compressed and kind.no_turboquant)
]
"""Each kind with and without asynchronous scheduling, once dense and once compressed. Models with
nothing but recurrent states are left out: they share and lack no blocks, and `tests/serving.py` has
no scheduler for them (`test_models.py` has an engine)."""


class Alone:
    """A server that has one request at a time, and remembers their answers."""

    def __init__(self, serving: Serving, near_tie: float):
        self._serving, self._near_tie = serving, near_tie
        self._answers: dict[tuple[int, ...], GreedyAnswer] = {}

    def tokens(self, token_ids: list[int], num_tokens: int) -> list[int]:
        return self._answer(token_ids).tokens[:num_tokens]

    def gives(self, arrival: Arrival, tokens: list[int]) -> bool:
        """Whether these tokens are, or begin, the answer to a request, up to a near tie."""
        return self._answer(arrival.token_ids) == tokens

    def _answer(self, token_ids: list[int]) -> GreedyAnswer:
        key = tuple(token_ids)
        if key not in self._answers:
            first = len(self._serving.outputs)
            [tokens] = self._serving.generate([token_ids], max_tokens=LONGEST_ANSWER, logprobs=2)
            scores = [output.logprobs for output in self._serving.outputs[first:]]
            leads = [s.logprobs[0][1] - s.logprobs[0][2] for s in scores if s is not None]
            self._answers[key] = GreedyAnswer(tokens, leads, self._near_tie)
        return self._answers[key]


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
    make_config, checkpoints, kind, compressed, async_scheduling
):
    common = {
        "model": str(checkpoints(kind)),
        "skip_tokenizer_init": False,
        "max_model_len": MAX_MODEL_LEN,
        "additional_config": TURBOQUANT if compressed else {},
    }
    alone = Alone(
        Serving(make_config(**common, enable_prefix_caching=False, async_scheduling=False)),
        NEAR_TIE[compressed],
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
    print(f"soak: {kind} {compressed} {async_scheduling}: {outcome}, {len(wrong)} wrong")
    assert wrong == []
