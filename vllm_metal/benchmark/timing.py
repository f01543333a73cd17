"""Times one case of an engine: when the first tokens came, and what a decode step takes."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

WARM_UP_STEPS, STRETCHES, STRETCH_STEPS = 8, 4, 16
"""Decode steps that are not counted, and the stretches of steps whose median is reported."""

STEPS = WARM_UP_STEPS + STRETCHES * STRETCH_STEPS
"""Tokens of each request after the first token of the last one."""


@dataclass(frozen=True)
class Case:
    """Requests that run together, each with a prompt of its own."""

    requests: int
    context: int
    """Tokens of each prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return self.requests * self.context

    @property
    def tokens(self) -> int:
        """Of all prompts and answers together."""
        return self.requests * (self.context + STEPS + 1)

    def __str__(self) -> str:
        return f"{self.requests} x {self.context:,}"


def cases(requests: Sequence[int], contexts: Sequence[int]) -> list[Case]:
    """Every number of requests with every context, those with the fewest tokens first."""
    every = (Case(*each) for each in product(sorted(set(requests)), sorted(set(contexts))))
    return sorted(every, key=lambda case: case.prompt_tokens)


@dataclass(frozen=True)
class Timing:
    """What was measured of one case."""

    first_token_seconds: float
    """From the start until every request had its first token."""
    step_milliseconds: float
    """Of a decode step, which gives every request one token: the median of `STRETCHES`."""
    tokens_per_second: float
    """Of all requests together, while all of them decode."""


def time_case(
    progress: Iterable[Sequence[int]], clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Follows an engine that says, again and again, how many tokens each request has been given.

    Args:
        progress: new tokens of each request so far. The requests begin when it is first asked. It
            is left after `STEPS` steps.
        clock: seconds.

    Raises:
        RuntimeError: it ends before.
    """
    started = clock()
    first: float | None = None
    given_first = 0
    marks: list[tuple[float, int]] = []  # when a stretch began, and how many tokens there were
    for given in progress:
        if not all(given):
            continue
        now = clock()
        if first is None:
            first, given_first = now, min(given)
        steps = min(given) - given_first
        if steps >= WARM_UP_STEPS + len(marks) * STRETCH_STEPS:
            marks.append((now, sum(given)))
        if len(marks) > STRETCHES:
            return _timing(first - started, marks, len(given))
    raise RuntimeError(f"the engine stopped after {len(marks)} of {STRETCHES} stretches of steps")


def _timing(first: float, marks: Sequence[tuple[float, int]], requests: int) -> Timing:
    seconds = [
        (end - begin) * requests / (tokens - before)
        for (begin, before), (end, tokens) in zip(marks, marks[1:], strict=False)
    ]
    step = median(seconds)
    return Timing(first, 1e3 * step, requests / step)
