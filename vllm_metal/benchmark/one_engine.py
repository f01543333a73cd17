"""Runs one engine in this process and writes what it finds, line by line.

    python -m vllm_metal.benchmark.one_engine TASK RESULTS

`TASK` is JSON (`Task`); `RESULTS` a file to which lines of JSON are appended. The first has
`cache_tokens`. There is one more for each case: its `requests` and `context`, and either the
figures of `Timing` or `skipped`, the reason why it was not run.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_metal.benchmark.engines import Engine, Settings, load
from vllm_metal.benchmark.timing import STEPS, Case, time_case


@dataclass(frozen=True)
class Task:
    """What one process is to measure."""

    engine: str
    settings: Settings
    cases: Sequence[Case]
    seconds: float
    """That it may take, loading included. A case that would take longer is not begun."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        task = json.loads(text)
        task["settings"] = Settings(**task["settings"])
        task["cases"] = [Case(**case) for case in task["cases"]]
        return cls(**task)


def results(
    engine: Engine, task: Task, started: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict]:
    """A line for the engine and one for each case."""
    holds = engine.cache_tokens()
    yield {"cache_tokens": holds}
    speed = step = None  # of the largest case so far: tokens of prompts, and steps, a second
    for case in task.cases:
        left = task.seconds - (clock() - started)
        line = asdict(case)
        needed = 0.0
        if speed and step:
            needed = case.prompt_tokens / speed + STEPS * step
        if holds is not None and case.tokens > holds:
            line["skipped"] = f"needs {case.tokens:,} tokens, the cache holds {holds:,}"
        elif needed > left:
            line["skipped"] = f"would take about {needed:.0f} s, and {max(left, 0):.0f} s are left"
        else:
            timing = time_case(engine.progress(engine.prompts(case)), clock)
            speed = case.prompt_tokens / timing.first_token_seconds
            step = timing.step_milliseconds / 1e3
            line |= asdict(timing)
        yield line


def main() -> None:
    started = time.perf_counter()
    task, path = Task.from_json(sys.argv[1]), Path(sys.argv[2])
    with path.open("a") as file:
        for line in results(load(task.engine, task.settings), task, started):
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
