"""Random traffic for a busy server, over real and over symbolic pages."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm.v1.request import Request, RequestStatus

from tests.serving import Serving

LONGEST_PROMPT, LONGEST_ANSWER = 72, 24
"""Tokens."""

AnswerOf = Callable[[list[int], int], list[int]]
"""The right answer to a prompt, of as many tokens."""


@dataclass(frozen=True)
class Arrival:
    """One request, and what happens after it has come."""

    token_ids: list[int]
    num_tokens: int
    steps: int
    """Steps of the server before the next request comes."""
    aborts: bool
    """Whether one of the requests so far, this one included, is aborted after these steps."""
    resets: bool
    """Whether the prefix cache is then reset, which preempts every running request."""


def prompt(rng: random.Random, length: int, vocabulary: int) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(length)]


def arrivals(
    rng: random.Random, count: int, vocabulary: int, answer_of: AnswerOf
) -> Iterator[Arrival]:
    """Requests that begin with shared prefixes, of whole blocks or parts of them.

    Many go on from the answer to an earlier one, which may still be computed.

    """
    prefixes = [prompt(rng, rng.choice([16, 17, 32, 48, 50]), vocabulary) for _ in range(3)]
    for _ in range(count):
        token_ids = list(rng.choice(prefixes))
        if rng.random() < 0.3:
            token_ids = token_ids[: rng.randrange(1, len(token_ids) + 1)]
        token_ids += prompt(rng, rng.choice([0, 0, 1, 9, 30]), vocabulary)
        token_ids = token_ids[:LONGEST_PROMPT]
        num_tokens = rng.randrange(1, LONGEST_ANSWER + 1)
        if len(token_ids) < LONGEST_PROMPT:
            answer = answer_of(token_ids, num_tokens)
            prefixes.append(token_ids + answer[: rng.randrange(num_tokens + 1)])
        steps = rng.choice([0, 0, 1, 2, 5])
        yield Arrival(token_ids, num_tokens, steps, rng.random() < 0.1, rng.random() < 0.03)


@dataclass
class Outcome:
    """What became of the requests."""

    requests: list[tuple[Arrival, Request]]
    preemptions: int
    resets: int

    @property
    def aborts(self) -> int:
        return sum(_is_aborted(request) for _, request in self.requests)

    def wrong(self, same: Callable[[Arrival, list[int]], bool]) -> list[str]:
        """Names of the requests whose answers are not the same as alone, or not whole.

        Args:
            same: says whether an answer, or its beginning, is what the request gets alone.
        """
        return [
            request.request_id
            for arrival, request in self.requests
            if not same(arrival, list(request.output_token_ids))
            or not (_is_aborted(request) or len(request.output_token_ids) == arrival.num_tokens)
        ]

    def __str__(self) -> str:
        return (
            f"{len(self.requests)} requests, {self.aborts} aborted, "
            f"{self.preemptions} preemptions, {self.resets} resets"
        )


def serve(
    serving: Serving, rng: random.Random, count: int, vocabulary: int, answer_of: AnswerOf
) -> Outcome:
    """Sends `count` requests to the server, and waits until all are finished."""
    outcome = Outcome([], 0, 0)
    for arrival in arrivals(rng, count, vocabulary, answer_of):
        name = str(len(outcome.requests))
        request = serving.add(name, arrival.token_ids, max_tokens=arrival.num_tokens)
        outcome.requests.append((arrival, request))
        for _ in range(arrival.steps):
            serving.step()
        if arrival.aborts:
            _, unlucky = rng.choice(outcome.requests)
            serving.scheduler.finish_requests(unlucky.request_id, RequestStatus.FINISHED_ABORTED)
        if arrival.resets:
            serving.scheduler.reset_prefix_cache(reset_running_requests=True)
            outcome.resets += 1
    serving.run()
    outcome.preemptions = serving.num_preemptions
    return outcome


def _is_aborted(request: Request) -> bool:
    return request.status == RequestStatus.FINISHED_ABORTED
