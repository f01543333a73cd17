"""Time to the first token of the whole engine on a GPU, beside mlx-lm's, on the same model.

    python benchmarks/gpu/first_token.py MODEL_FOLDER [--lengths 512,8192] [--pages dense]

One process measures mlx-lm, dense pages and compressed ones, one after the other: prompts of one
length, each of other tokens, so that nothing is found in the prefix cache. The first one of a
length warms up; the others are all given, and the best is the figure.

Each figure is a line of JSON on standard output as soon as it is there, and in FILE if it is given.
Needs vLLM, MLX on a GPU and mlx-lm; reaches no network.
"""

import gc
from collections.abc import Callable, Sequence

from serving_engine import Engine, MlxLm, Report, compiled, prompts, say  # isort: skip

import mlx.core as mx
from engine_step import parser

LENGTHS = "512,2048,8192,32000"


def measure(
    first_token: Callable[[Sequence[int]], float],
    pages: str,
    lengths: Sequence[int],
    rounds: int,
    vocabulary: int,
    report: Report,
) -> None:
    """Reports each length, given what takes a prompt and returns the seconds to its first token."""
    for length in lengths:
        say(f"{pages}: prompts of {length}")
        before = compiled()
        first_token(prompts(1, length, vocabulary, seed=99)[0])
        mx.reset_peak_memory()
        seconds = [
            first_token(prompts(1, length, vocabulary, seed=seed)[0]) for seed in range(rounds)
        ]
        report(
            "first token",
            pages,
            tokens=length,
            seconds=min(seconds),
            all_seconds=seconds,
            peak_gb=mx.get_peak_memory() / 1e9,
            compiled=len(compiled() - before),
        )


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--lengths", default=LENGTHS, metavar="TOKENS,...")
    command.add_argument("--rounds", type=int, default=3)
    arguments = command.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    report = Report(arguments.output)
    report("machine", "", device=str(mx.device_info().get("device_name")), mlx=mx.__version__)
    for pages in arguments.pages:
        how = pages, lengths, arguments.rounds, arguments.vocabulary, report
        if pages == "mlx-lm":
            model = MlxLm(arguments.model)
            measure(lambda prompt, model=model: model.times(prompt, 1)[0], *how)
            del model
            gc.collect()
            mx.clear_cache()
            continue
        engine = Engine(
            arguments.model, pages, max(lengths) + 16, arguments.cache_gib, arguments.as_served
        )
        report("start", pages, **engine.start)
        measure(lambda prompt, engine=engine: engine.step_times([prompt], 1)[-1], *how)
        engine.stop()
    say("done")


if __name__ == "__main__":
    main()
