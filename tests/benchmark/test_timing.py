"""The times of a case, from an engine and a clock that the tests move."""

import itertools

import pytest

from vllm_metal.benchmark.timing import (
    STEPS,
    STRETCH_STEPS,
    STRETCHES,
    WARM_UP_STEPS,
    Case,
    cases,
    time_case,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(clock: Clock, seconds: float, requests: int, prompts: float = 2.0):
    """One prompt after the other, while those before decode; then all of them for ever."""
    given = [0] * requests
    for begun in itertools.chain(range(1, requests + 1), itertools.repeat(requests)):
        clock.now += prompts if given[begun - 1] == 0 else seconds
        given = [count + (i < begun) for i, count in enumerate(given)]
        yield list(given)


@pytest.mark.parametrize("requests", [1, 3])
def test_first_tokens_and_steps(requests):
    clock = Clock()
    timing = time_case(steps(clock, 0.25, requests), clock)
    assert timing.first_token_seconds == pytest.approx(2.0 * requests)
    assert timing.step_milliseconds == pytest.approx(250)
    assert timing.tokens_per_second == pytest.approx(4 * requests)


def test_the_clock_begins_before_the_engine_does():
    clock = Clock()

    def progress():
        clock.now += 5
        yield from steps(clock, 1, 1)

    assert time_case(progress(), clock).first_token_seconds == pytest.approx(7)


def test_no_more_steps_are_taken_than_are_counted():
    clock, taken = Clock(), []

    def progress():
        for given in steps(clock, 1, 2):
            taken.append(given)
            yield given

    time_case(progress(), clock)
    assert min(taken[-1]) == STEPS + 1


def test_slow_steps_at_first_and_one_slow_stretch_do_not_count():
    slow = set(range(WARM_UP_STEPS)) | {WARM_UP_STEPS + STRETCH_STEPS}
    clock = Clock()

    def progress():
        yield [1]
        for step in range(STEPS):
            clock.now += 9 if step in slow else 0.5
            yield [step + 2]

    assert time_case(progress(), clock).step_milliseconds == pytest.approx(500)


def test_an_engine_that_gives_several_tokens_at_a_time():
    clock = Clock()

    def progress():
        for given in itertools.count(1, 4):
            clock.now += 1
            yield [given]

    assert time_case(progress(), clock).step_milliseconds == pytest.approx(250)


def test_an_engine_that_stops():
    with pytest.raises(RuntimeError, match=f"after 1 of {STRETCHES} stretches"):
        time_case(iter([[i + 1] for i in range(WARM_UP_STEPS + 3)]), Clock())


def test_cases_begin_with_the_fewest_tokens():
    assert cases([4, 1, 1], [100, 10]) == [Case(1, 10), Case(4, 10), Case(1, 100), Case(4, 100)]
    assert Case(4, 10).tokens == 4 * (10 + STEPS + 1)
    assert str(Case(16, 32768)) == "16 x 32,768"
