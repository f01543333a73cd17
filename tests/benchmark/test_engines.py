"""Both kinds of engines give the tokens that they count."""

import itertools

import pytest

from tests.tiny_models import VOCABULARY, save_checkpoint, save_tokenizer
from vllm_metal.benchmark import engines
from vllm_metal.benchmark.engines import DENSE, MLX_LM, Settings
from vllm_metal.benchmark.timing import Case, time_case

CASES = [Case(1, 40), Case(3, 40)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = save_checkpoint(tmp_path_factory.mktemp("bench") / "llama")
    save_tokenizer(folder)
    return Settings(str(folder), None, False, 40, 3, 32, 0.1)


@pytest.fixture(scope="module", params=[MLX_LM, pytest.param(DENSE, marks=pytest.mark.engine)])
def engine(request, settings):
    return engines.load(request.param, settings)


def test_vocabulary(engine):
    assert engine.vocabulary == VOCABULARY


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_come_one_by_one(engine, case):
    progress = engine.progress(engine.prompts(case))
    given = [counts for counts in itertools.islice(progress, 30) if any(counts)]
    progress.close()
    assert all(len(counts) == case.requests for counts in given)
    grown = [
        after - before
        for pair in itertools.pairwise(given)
        for before, after in zip(*pair, strict=True)
    ]
    assert set(grown) <= {0, 1}
    assert min(given[-1]) >= 10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_can_be_timed_to_its_end_again_and_again(engine, case):
    for _ in range(2):
        assert time_case(engine.progress(engine.prompts(case))).step_milliseconds > 0


def test_the_cache_of_vllm_is_counted(engine):
    tokens = engine.cache_tokens()
    assert tokens is None or tokens >= CASES[-1].tokens
