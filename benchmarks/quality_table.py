"""Writes the measured tables of `docs/turboquant.md` from the committed measurements.

    python benchmarks/quality_table.py [--check]

The figures are those of the file named below, whose `runs` are what `vllm-metal eval ... --output
FIGURES` has written, the newest of a model first. With `--check` nothing is written and the exit
code says whether the page is current.
"""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "vllm_metal/metal_kernel_backend/turboquant/measured_loss.json"
PAGE = ROOT / "docs" / "turboquant.md"
BEGIN = "<!-- quality: begin, written by benchmarks/quality_table.py -->\n"
END = "<!-- quality: end -->"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "bits per element": lambda row: f"{row['bits_per_element']:.2f}",
    "tokens, against 16 bit": lambda row: f"{row['ratio']:.2f}x",
    "KLD": lambda row: f"{row['kld']:.4f}",
    "KLD, long window": lambda row: f"{row['long_window_kld']:.4f}",
    "perplexity": lambda row: f"{100 * (row['perplexity_ratio'] - 1):+.1f} %",
    "same most likely token": lambda row: f"{100 * row['top1_agreement']:.1f} %",
    "attention error": lambda row: f"{100 * row['attention_error']:.1f} %",
    "sentences found": lambda row: f"{row['needles_kept']} of {row['needles_found_dense']}",
}
"""What a column shows of a pair; a run that left a measurement out lacks its column."""


def table(run: dict) -> str:
    """The figures of one run as a Markdown table, and where they were measured."""
    shown = {head: show for head, show in COLUMNS.items() if _has(run, show)}
    rows = [
        " | ".join(["| keys / values", *shown]) + " |",
        "| --- " * (1 + len(shown)) + "|",
    ]
    for name, row in run["pairs"].items():
        rows.append(" | ".join([f"| `{name}`", *(show(row) for show in shown.values())]) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    windows = f"{run['windows']} windows of {run['window_tokens']} tokens of {run['text']}"
    if run["long_window_tokens"]:
        windows += f", and one of {run['long_window_tokens']}"
    return "\n".join(
        [
            "",
            f"### {run['model']}, head size {run['head_size']}, {run['date']}",
            "",
            *rows,
            "",
            textwrap.fill(
                f"{windows}; dense perplexity {run['dense_perplexity']:.2f}. {run['machine']}, "
                f"{run['mlx_device']}, kernels: {run['kernels']}; {versions}, {run['date']}.",
                100,
            ),
            "",
            "",
        ]
    )


def _has(run: dict, show: Callable[[dict], str]) -> bool:
    """Whether every pair of a run has what a column shows."""
    try:
        return all(map(show, run["pairs"].values()))
    except KeyError:
        return False


def page(text: str, runs: list[dict]) -> str:
    """The page with the tables of all runs between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(map(table, runs)) + END + after


def main() -> int:
    """Returns the exit code."""
    text = PAGE.read_text()
    current = page(text, json.loads(FIGURES.read_text())["runs"])
    if "--check" in sys.argv[1:]:
        return int(current != text)
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
