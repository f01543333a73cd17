"""The table and the plot of `vllm-metal bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_metal.benchmark.engines import MLX_LM
from vllm_metal.benchmark.timing import Case

HEADER = (
    f"{'requests x tokens':<19}{'engine':<12}{'first token':>13}{'decode step':>13}"
    f"{'tokens/s':>10}{'of mlx-lm':>11}"
)

Figures = Mapping[str, Sequence[dict]]
"""Lines of `one_engine` by the name of the engine. An engine that failed has one line: `failed`."""


def table(figures: Figures) -> str:
    """One line for each case and engine; steps are compared with mlx-lm's where it ran."""
    lines = [_capacity(name, rows) for name, rows in figures.items()] + ["", HEADER]
    for case in _cases(figures):
        label = str(case)
        reference = _row(figures.get(MLX_LM, ()), case)
        for name, rows in figures.items():
            row = _row(rows, case)
            if row is not None:
                lines.append(f"{label:<19}{name:<12}{_columns(row, reference)}")
                label = ""
    return "\n".join(lines)


def _capacity(name: str, rows: Sequence[dict]) -> str:
    if "failed" in rows[0]:
        return f"{name:<12}did not run: {rows[0]['failed']}"
    tokens = rows[0]["cache_tokens"]
    holds = "grows as it is filled" if tokens is None else f"holds {tokens:,} tokens"
    return f"{name:<12}KV cache {holds}"


def _columns(row: Mapping, reference: Mapping | None) -> str:
    if "skipped" in row:
        return f"  not run: {row['skipped']}"
    ratio = ""
    if reference and "step_milliseconds" in reference:
        ratio = f"{row['step_milliseconds'] / reference['step_milliseconds']:.2f}x"
    return (
        f"{row['first_token_seconds']:>11.3f} s{row['step_milliseconds']:>10.2f} ms"
        f"{row['tokens_per_second']:>10.1f}{ratio:>11}"
    )


def _cases(figures: Figures) -> list[Case]:
    found = {case_of(row): None for rows in figures.values() for row in rows if "context" in row}
    return sorted(found, key=lambda case: (case.requests, case.context))


def case_of(row: Mapping) -> Case:
    """What a line is about."""
    return Case(row["requests"], row["context"])


def _row(rows: Sequence[dict], case: Case) -> dict | None:
    return next((row for row in rows if "context" in row and case_of(row) == case), None)


def plot(figures: Figures, title: str, path: Path) -> None:
    """Decode steps of one request against its context, and tokens a second against requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = _cases(figures)
    fewest = min(case.requests for case in every)
    shortest = min(case.context for case in every)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, rows in figures.items():
        measured = {case_of(row): row for row in rows if "step_milliseconds" in row}
        for axes, x, y, fixed in (
            (left, "context", "step_milliseconds", ("requests", fewest)),
            (right, "requests", "tokens_per_second", ("context", shortest)),
        ):
            points = sorted(
                (row[x], row[y]) for row in measured.values() if row[fixed[0]] == fixed[1]
            )
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
    left.set_title(f"Decode step, {fewest} request{'s' * (fewest > 1)}")
    left.set_xlabel("tokens of context")
    left.set_ylabel("milliseconds")
    right.set_title(f"All requests together, {shortest:,} tokens each")
    right.set_xlabel("requests")
    right.set_ylabel("tokens a second")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        ticks = sorted({x for line in axes.get_lines() for x in line.get_xdata()})
        axes.set_xticks(ticks, [f"{int(x):,}" for x in ticks])
        axes.minorticks_off()
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
