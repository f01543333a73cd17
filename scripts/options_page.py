"""Writes `docs/options.md`: what becomes of each of vLLM's options.

    python scripts/options_page.py            write the page
    python scripts/options_page.py --check    write nothing; exit 1 unless the page is current

The page says what `vllm_metal/options/table.toml` says, by which a server checks its options.
"""

import argparse
import sys
from pathlib import Path

from vllm_metal.options.check import flag
from vllm_metal.options.table import APPLIED, ENVIRONMENT, NO_EFFECT, OPTIONS, REFUSED

PAGE = Path(__file__).parent.parent / "docs" / "options.md"

_INTRODUCTION = """\
# vLLM's options

Written by `scripts/options_page.py` from `vllm_metal/options/table.toml`; do not edit. Every option
of vLLM's engine is here, under one of three headings. An option of `vllm serve` is the argument of
the same name of `LLM`, and a name without dashes is an argument of `LLM` only.

"""

_HEADINGS = {
    REFUSED: """\
## Refused

A server does not start with one of these, and says why. Values that are served are in brackets.

""",
    NO_EFFECT: """\
## No effect

A server starts and gives the same answers as without them. One line at start names those that it
was given, but for the options in italics, whose value vLLM does not pass on.

""",
    APPLIED: """\
## Applied

""",
}

_ENVIRONMENT = """
## Environment variables

These variables of vLLM's have no effect either, and are named in the same line:

"""


def page() -> str:
    """Markdown."""
    text = _INTRODUCTION
    for outcome, heading in _HEADINGS.items():
        text += heading + "| options | reason |\n| --- | --- |\n"
        for why, names in _by_reason(outcome).items():
            text += f"| {', '.join(names)} | {why} |\n"
        text += "" if outcome == APPLIED else "\n"
    rows = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in ENVIRONMENT.items())
    return text + _ENVIRONMENT + "| variable | reason |\n| --- | --- |\n" + rows


def _by_reason(outcome: str) -> dict[str, list[str]]:
    """Options with one outcome, as Markdown, by the reason and the values that are served."""
    rows: dict[str, list[str]] = {}
    for option in OPTIONS:
        if option.outcome != outcome:
            continue
        values = [] if outcome == NO_EFFECT else option.allowed
        allowed = ", ".join(f"`{value}`" for value in values if not isinstance(value, bool))
        why = option.why + (f" ({allowed})" if allowed else "")
        unseen = outcome == NO_EFFECT and option.owner == "unseen"
        name = f"`{flag(option.name)}`"
        rows.setdefault(why, []).append(f"*{name}*" if unseen else name)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes docs/options.md.")
    parser.add_argument("--check", action="store_true", help="fail unless the page is current")
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print("docs/options.md is not current: run scripts/options_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
