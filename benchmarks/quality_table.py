"""Writes the measured table of `docs/turboquant.md` from the committed measurement.

    python benchmarks/quality_table.py [--check]

The figures come from `vllm-metal eval ... --output FIGURES` (the file named below). With `--check`
nothing is written and the exit code says whether the page is current.
"""

import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "vllm_metal/metal_kernel_backend/turboquant/measured_loss.json"
PAGE = ROOT / "docs" / "turboquant.md"
BEGIN = "<!-- quality: begin, written by benchmarks/quality_table.py -->\n"
END = "<!-- quality: end -->"


def table(figures: dict) -> str:
    """The figures as a Markdown table, and where they were measured."""
    rows = [
        "| keys / values | bits per element | tokens, against 16 bit | KLD | KLD, long window | "
        "perplexity | same most likely token | attention error | sentences found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures["pairs"].items():
        percent = 100 * (row["perplexity_ratio"] - 1)
        rows.append(
            f"| `{name}` | {row['bits_per_element']:.2f} | {row['ratio']:.2f}x | "
            f"{row['kld']:.4f} | {row['long_window_kld']:.4f} | {percent:+.1f} % | "
            f"{100 * row['top1_agreement']:.1f} % | {100 * row['attention_error']:.1f} % | "
            f"{row['needles_kept']} of {row['needles_found_dense']} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    return "\n".join(
        [
            "",
            *rows,
            "",
            textwrap.fill(
                f"{figures['windows']} windows of {figures['window_tokens']} tokens of "
                f"{figures['text']}, and one of {figures['long_window_tokens']}; dense perplexity "
                f"{figures['dense_perplexity']:.2f}. {figures['machine']}, "
                f"{figures['mlx_device']}, kernels: {figures['kernels']}; {versions}, "
                f"{figures['date']}.",
                100,
            ),
            "",
            "",
        ]
    )


def page(text: str, figures: dict) -> str:
    """The page with the table of `figures` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(figures) + END + after


def main() -> int:
    """Returns the exit code."""
    text = PAGE.read_text()
    current = page(text, json.loads(FIGURES.read_text()))
    if "--check" in sys.argv[1:]:
        return int(current != text)
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
