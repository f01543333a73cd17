"""Which cases are run, and what is written of them."""

import itertools
from dataclasses import asdict

import pytest

from vllm_metal.benchmark.engines import Engine, Settings
from vllm_metal.benchmark.one_engine import Task, results
from vllm_metal.benchmark.timing import STEPS, Case

SETTINGS = Settings("model", None, False, 200, 4, 64, None)


class Steady(Engine):
    """Reads 100 tokens of prompts a second and takes 0.1 s for a step."""

    vocabulary = 1000

    def __init__(self, holds: int | None = None):
        self.holds, self.now, self.asked = holds, 0.0, []

    def cache_tokens(self):
        return self.holds

    def progress(self, prompts):
        self.asked.append((len(prompts), len(prompts[0])))
        self.now += sum(map(len, prompts)) / 100
        for given in itertools.count(1):
            yield [given] * len(prompts)
            self.now += 0.1


def run(engine: Steady, cases: list[Case], seconds: float) -> list[dict]:
    task = Task("dense", SETTINGS, cases, seconds)
    return list(results(engine, task, 0.0, lambda: engine.now))


def test_each_case_has_a_line():
    cases = [Case(1, 100), Case(4, 100)]
    engine, one, four = run(Steady(), cases, 1e9)
    assert engine == {"cache_tokens": None}
    assert one == asdict(cases[0]) | {
        "first_token_seconds": pytest.approx(1),
        "step_milliseconds": pytest.approx(100),
        "tokens_per_second": pytest.approx(10),
    }
    assert four["first_token_seconds"] == pytest.approx(4)
    assert four["tokens_per_second"] == pytest.approx(40)


def test_what_does_not_fit_the_cache_is_left_out():
    fits = Case(1, 100)
    engine = Steady(holds=fits.tokens)
    lines = run(engine, [fits, Case(1, 101), Case(2, 20)], 1e9)
    assert engine.asked == [(1, 100)]
    assert lines[2]["skipped"] == f"needs {fits.tokens + 1} tokens, the cache holds {fits.tokens}"
    assert "skipped" in lines[3]


def test_what_would_take_too_long_is_left_out():
    first, later = Case(1, 100), Case(1, 200)
    taken = 1 + 0.1 * STEPS
    needed = 2 + 0.1 * STEPS
    for seconds, runs in ((taken + needed - 0.1, False), (taken + needed + 0.1, True)):
        engine = Steady()
        lines = run(engine, [first, later], seconds)
        assert engine.asked == [(1, 100), (1, 200)][: 1 + runs]
        assert ("skipped" in lines[2]) is not runs


def test_a_task_survives_its_json():
    task = Task("q8_0/q3_0", SETTINGS, [Case(1, 2), Case(3, 4)], 1.5)
    assert Task.from_json(task.to_json()) == task


def test_prompts_are_those_of_every_engine_and_differ_from_each_other():
    case = Case(4, 64)
    prompts = Steady().prompts(case)
    assert prompts == Steady().prompts(case)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 4
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
