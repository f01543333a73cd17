"""Small forward passes before the first request that decide how decode runs.

They ask two things of the model: may requests be decoded together, each with a position of its
own, and may the step be traced and replayed? The answers are sought on dense pages, which keep what
they are given. Through compressed pages a rounding difference can tip a code of a key or a value to
the next one, and the logits then differ by far more than by rounding. That rows and traces are
right on compressed pages is a property of the backend, which its tests hold, not of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.errors import UserError
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import BoundModel, ModelBinding
from vllm_metal.startup.crash_marker import CrashMarker
from vllm_metal.startup.probe_requests import DecodeStep, ProbeRequests, on_dense_pages

TOLERANCE = 0.1
"""Largest difference of a row's logits, in standard deviations: far above rounding in any
precision, far below what a wrong position does."""


@dataclass(frozen=True)
class Answer:
    """What a probe found."""

    holds: bool
    reason: str = ""
    """Why it does not hold, in words that follow a colon."""


@dataclass(frozen=True)
class DecodeAnswers:
    """What decides how decode runs."""

    batched: Answer
    """Whether requests are decoded together."""
    traced: Answer
    """Whether a step is traced and replayed; not asked where requests are decoded one by one."""


def ask(
    binding: ModelBinding, prompts: Sequence[Sequence[int]], tracing: CrashMarker
) -> DecodeAnswers:
    """Both answers.

    Args:
        binding: the model.
        prompts: as `probe_prompts` makes them.
        tracing: marks the time in which a fault of MLX would end the process.

    Raises:
        UserError: the model's logits are not numbers.
    """
    batched = takes_batched_offsets(binding, prompts)
    if not batched.holds:
        return DecodeAnswers(batched, Answer(False, "requests are decoded one by one"))
    if tracing.left_behind:
        return DecodeAnswers(batched, _ended_before(tracing))
    with tracing.trying():
        return DecodeAnswers(batched, can_be_traced(binding, prompts))


def takes_batched_offsets(binding: ModelBinding, prompts: Sequence[Sequence[int]]) -> Answer:
    """Whether a `(B, 1)` decode with an array of offsets gives what B `(1, 1)` decodes give.

    Args:
        binding: the model.
        prompts: as `probe_prompts` makes them.

    Raises:
        UserError: the model's logits are NaN.
    """
    if not binding.decodes_batches:
        return Answer(False, "its attention changes with the length of a request")
    requests, rows = on_dense_pages(binding, prompts), range(len(prompts))
    alone = mx.concatenate([requests.decode_anew([row]) for row in rows])
    _require_numbers(binding, alone)
    try:
        together = requests.decode_anew(rows)
    except (TypeError, ValueError) as error:
        return Answer(False, f"it takes one position for all rows ({error})")
    differences = row_differences(together, alone)
    if max(differences) < TOLERANCE:
        return Answer(True)
    # Rounding, which is another one where there are more rows, may have tipped a choice of the
    # model, as of an expert. Then a row gives the same in any company of as many rows.
    in_other_company = mx.concatenate(
        [requests.decode_anew([row] * len(prompts))[:1] for row in rows]
    )
    independent = max(row_differences(together, in_other_company)) < TOLERANCE
    if independent and min(differences) < TOLERANCE:
        return Answer(True)
    return Answer(
        False,
        "logits of requests that are decoded together differ from those of each alone by "
        f"{max(differences):.2f} standard deviations (allowed: {TOLERANCE})",
    )


def can_be_traced(binding: ModelBinding, prompts: Sequence[Sequence[int]]) -> Answer:
    """Whether replayed traces of one row and of two give what the forward pass gives.

    Runs after `takes_batched_offsets`.
    """
    requests = on_dense_pages(binding, prompts)
    if requests.kv_cache.shares_arrays:
        return Answer(False, "its recurrent states are read and written within a step")
    graphs = DecodeGraphs(requests.model)
    try:
        requests.prefill()
        empty = graphs.empty_operations(*requests.decode_inputs([0]))
        if empty and mx.default_device() != mx.Device(mx.cpu):
            return Answer(False, f"it computes arrays without elements ({', '.join(set(empty))})")
        for traced, replayed in (([0], ([1], [2])), ([0, 1], ([1, 2], [2, 0]))):
            for _ in range(2):  # a shape is traced when it comes a second time
                requests.decode(traced, graphs)
            differences = []
            for rows in replayed:
                logits = requests.decode(rows, graphs)
                differences += row_differences(logits, requests.decode(rows))
            right = [difference < TOLERANCE for difference in differences]
            if 2 * sum(right) < len(right):  # rounding may tip a row; a wrong trace is all wrong
                return Answer(
                    False,
                    f"logits of its replayed trace differ by {max(differences):.2f} standard "
                    f"deviations (allowed: {TOLERANCE})",
                )
    except (TypeError, ValueError, RuntimeError) as error:
        return Answer(False, f"its forward pass cannot be traced ({error})")
    return Answer(True)


def decode_step(
    model: BoundModel,
    prompts: Sequence[Sequence[int]],
    answers: DecodeAnswers,
    tracing: CrashMarker,
) -> tuple[DecodeStep, Answer]:
    """What decodes on the server's pages, warm, and whether it replays traces.

    Prompts and decode steps of up to two rows have then run on the server's own pages: a model that
    would fail in its first request fails here, and what the first steps need is compiled. They use
    a block of each KV group for each row, which no request owns yet; nothing is run where there are
    too few.

    Args:
        model: over the server's pages.
        prompts: as `probe_prompts` makes them.
        answers: about the model.
        tracing: marks the time in which a fault of MLX would end the process.

    Raises:
        UserError: the model's logits are NaN.
    """
    requests = ProbeRequests(model, prompts[:2])
    rows, traced = [[0], [0, 1]] if answers.batched.holds else [[0]], answers.traced
    if traced.holds and tracing.left_behind:
        traced = _ended_before(tracing)
    if traced.holds and model.kv_cache.shares_arrays:
        traced = Answer(False, "layers of several KV groups share memory, and a step waits for it")
    if requests.fit:
        requests.prefill()
    if traced.holds:
        graphs = DecodeGraphs(model)
        try:
            with tracing.trying():
                _run(requests, graphs, rows)
            return graphs, traced
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            traced = Answer(False, f"its step cannot be traced on these pages ({error})")
    _run(requests, model.forward, rows)
    return model.forward, traced


def _ended_before(tracing: CrashMarker) -> Answer:
    reason = "the process that traced it before ended in the middle of it"
    return Answer(False, f"{reason}; delete {tracing.path} to try again")


def _run(requests: ProbeRequests, step: DecodeStep, rows_of_steps: Sequence[list[int]]) -> None:
    for rows in rows_of_steps if requests.fit else ():
        for _ in range(2):  # a shape is traced when it comes a second time
            _require_numbers(requests.model.binding, requests.decode(rows, step))


def row_differences(logits: mx.array, expected: mx.array) -> list[float]:
    """Largest difference in each row, in standard deviations; infinite where it is not a number."""
    largest = mx.abs(logits - expected).max(axis=-1) / mx.std(expected)
    differences: list[float] = mx.where(largest >= 0, largest, mx.inf).tolist()  # type: ignore[assignment]
    return differences


def _require_numbers(binding: ModelBinding, logits: mx.array) -> None:
    if mx.isnan(logits).any().item():
        raise UserError(
            f"Model type {binding.model_type!r} produces NaN logits",
            [
                "its weights are damaged or overflow in this --dtype, or the model uses its KV "
                "cache in a way that was not noticed at load"
            ],
        )
