"""Decode steps of the whole engine on a GPU, beside mlx-lm's own generation of the same model.

    python benchmarks/gpu/engine_step.py MODEL_FOLDER
    python benchmarks/gpu/engine_step.py MODEL_FOLDER --pages q8_0/q3_0 --cases 1x512,8x8192

One process measures mlx-lm, dense pages and compressed ones, one after the other. A case is
REQUESTSxTOKENS. Its requests run once, so that prompts are cached and everything is compiled, and
then once more with 161 greedy tokens each: the time of a decode step is that of the last 128 steps
on average; their median is given, too. mlx-lm generates one request at a time, so it has the cases
of one request only. `host` is what Python and MLX take of the time (`HostTimes`).

Then, for each kind of pages: one request of 512 tokens runs for 500 steps, whose peak memory should
not grow; and 20 requests of mixed lengths run together after two that warm the engine up, for which
no kernel should be compiled any more.

Each figure is a line of JSON on standard output as soon as it is there, and in FILE if it is given.
Needs vLLM, MLX on a GPU and mlx-lm; reaches no network.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from serving_engine import Engine, MlxLm, Report, compiled, prompts, say  # isort: skip

import mlx.core as mx

PAGES = ("mlx-lm", "dense", "q8_0/q3_0")
CASES = "1x512,1x8192,1x32000,8x8192,16x1024"
NEW_TOKENS, TIMED, LONG_RUN, SETTLED = 161, 128, 500, 20
MIXED_LENGTHS = (3, 700, 40, 2500, 129, 1, 9000, 16, 333, 65, 5000, 12, 1024, 250, 31, 7, 90, 3000)
MIXED_LENGTHS += (517, 77)


def milliseconds(times: Sequence[float]) -> dict[str, float]:
    """Average and median of the last `TIMED` steps, without the one that ends the requests."""
    last = times[-TIMED - 2 : -1]
    each = [1e3 * (after - before) for before, after in zip(last, last[1:], strict=False)]
    return {"milliseconds": statistics.fmean(each), "median": statistics.median(each)}


def mlx_lm_steps(arguments: argparse.Namespace, report: Report) -> None:
    model = MlxLm(arguments.model)
    for requests, length in arguments.cases:
        if requests > 1:
            continue
        say(f"mlx-lm: {requests}x{length}")
        [prompt] = prompts(1, length, arguments.vocabulary)
        model.times(prompt, 8)
        mx.reset_peak_memory()
        times = model.times(prompt, NEW_TOKENS)
        report(
            "step",
            "mlx-lm",
            requests=1,
            tokens=length,
            **milliseconds(times),
            first_token_seconds=times[0],
            peak_gb=mx.get_peak_memory() / 1e9,
        )


def step(engine: Engine, pages: str, requests: int, length: int, vocabulary: int) -> dict:
    """One case."""
    say(f"{pages}: {requests}x{length}")
    given, before = prompts(requests, length, vocabulary), compiled()
    first = engine.step_times(given, 1)[-1]
    engine.step_times(given, NEW_TOKENS)
    warm = compiled()
    mx.reset_peak_memory()
    engine.host.clear()
    times = engine.step_times(given, NEW_TOKENS)
    return {
        "requests": requests,
        "tokens": length,
        **milliseconds(times),
        "host": engine.host.medians(),
        "first_token_seconds": first / requests,
        "peak_gb": mx.get_peak_memory() / 1e9,
        "compiled": [len(warm - before), len(compiled() - warm)],
    }


def long_run(engine: Engine, pages: str, vocabulary: int) -> dict:
    """Peak memory over many steps of one request, after the first ones and at the end."""
    say(f"{pages}: {LONG_RUN} steps")
    given = prompts(1, 512, vocabulary, seed=7)
    engine.step_times(given, SETTLED)
    peaks = []
    for count in (SETTLED, LONG_RUN):
        mx.reset_peak_memory()
        engine.step_times(given, count)
        peaks.append(mx.get_peak_memory())
    return {"steps": [SETTLED, LONG_RUN], "peak_gb": [peak / 1e9 for peak in peaks]}


def mixed(engine: Engine, pages: str, vocabulary: int, longest: int) -> dict:
    """Requests of many lengths, after two: what was compiled for them."""
    say(f"{pages}: mixed lengths")
    engine.step_times(prompts(1, 300, vocabulary, seed=1), 8)
    engine.step_times(prompts(1, 20, vocabulary, seed=2), 8)
    before = compiled()
    lengths = [min(length, longest) for length in MIXED_LENGTHS]
    given = [prompts(1, length, vocabulary, seed=3 + i)[0] for i, length in enumerate(lengths)]
    times = engine.step_times(given, [5 + 7 * i % 60 for i in range(len(given))])
    new = sorted(compiled() - before)
    return {"requests": len(given), "seconds": times[-1], "compiled": len(new), "names": new}


def engine_steps(arguments: argparse.Namespace, pages: str, report: Report) -> None:
    longest = max(length for _, length in arguments.cases)
    max_model_len = max(longest, 512 + LONG_RUN) + NEW_TOKENS
    engine = Engine(arguments.model, pages, max_model_len, arguments.cache_gib, arguments.as_served)
    report("start", pages, **engine.start)
    for requests, length in arguments.cases:
        report("step", pages, **step(engine, pages, requests, length, arguments.vocabulary))
    report("long run", pages, **long_run(engine, pages, arguments.vocabulary))
    report("mixed", pages, **mixed(engine, pages, arguments.vocabulary, longest))
    engine.stop()


def cases(text: str) -> list[tuple[int, int]]:
    """(requests, tokens) of each case."""
    pairs = [case.split("x") for case in filter(None, text.split(","))]
    return [(int(requests), int(length)) for requests, length in pairs]


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that the benchmarks of the engine share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("model", metavar="MODEL_FOLDER")
    found.add_argument("--pages", nargs="+", default=PAGES, help="mlx-lm, dense, q8_0/q3_0, ...")
    found.add_argument("--vocabulary", type=int, default=49_000, help="token ids are below it")
    found.add_argument("--cache-gib", type=float, default=16, help="of pages")
    found.add_argument("--as-served", action="store_true", help="calibrate and probe at the start")
    found.add_argument("--output", type=Path, metavar="FILE", help="append the figures here, too")
    return found


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--cases", type=cases, default=cases(CASES), metavar="REQUESTSxTOKENS,...")
    arguments = command.parse_args()
    report = Report(arguments.output)
    report("machine", "", device=str(mx.device_info().get("device_name")), mlx=mx.__version__)
    for pages in arguments.pages:
        if pages == "mlx-lm":
            mlx_lm_steps(arguments, report)
            mx.clear_cache()
        else:
            engine_steps(arguments, pages, report)
    say("done")


if __name__ == "__main__":
    main()
