"""Measured loss of each format pair, as shown by the start-up report, `plan` and the docs.

The figures come from `measured_loss.json`, which holds runs of `vllm-metal eval ... --output`, the
newest of a model first. A run has one model, its head size, one text and the pairs that it measured
under their names. The figures order the formats; another model loses more or less, so whatever
shows a loss names the model that it was measured on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair, parse_pair

RESULTS = Path(__file__).with_name("measured_loss.json")

SHOWN_PAIRS = tuple(
    map(
        parse_pair,
        (
            "q8_0/q8_0",
            "q8_0/q4_0",
            "q6_0/q6_0",
            "q8_0/q3_0",
            "q6_0/q4_0",
            "q5_0/q4_0",
            "q5_0/q3_0",
            "q4_0/q4_0",
            "q4_0/q3_0",
            "q3_0/q4_0",
            "q4_0/q2_0",
            "q3_0/q3_0",
            "q3_0/q2_0",
        ),
    )
)
"""The one list of pairs that are measured and shown, from most to fewest bytes."""


@dataclass(frozen=True)
class Loss:
    """What a pair lost in a committed run."""

    model: str
    """The model that was measured."""
    head_size: int
    """Elements of one of its keys."""
    kld: float
    """Mean KL divergence of the next-token distribution from the dense cache's, in nats."""
    perplexity_ratio: float

    def __str__(self) -> str:
        percent = 100 * (self.perplexity_ratio - 1)
        return (
            f"KLD {self.kld:.4f}, perplexity {percent:+.1f} % "
            f"({self.model}, head size {self.head_size})"
        )


@cache
def _runs() -> Sequence[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["runs"]


def measured_loss(
    formats: FormatPair, model: str = "", head_size: int | None = None
) -> Loss | None:
    """The committed measurement of a pair that comes nearest to a model, or None.

    Of the runs with the pair, one of the same model counts as nearer than one of the same head
    size, and that as nearer than any other; among equals the first of the file is taken.

    Args:
        formats: the pair.
        model: name or folder of the model that is asked about. It is taken for a measured one if
            its last part begins with that one's name.
        head_size: elements of one of its keys.
    """
    name = model.rstrip("/").rpartition("/")[2].lower()

    def distance(run: dict[str, Any]) -> int:
        if name.startswith(run["model"].lower()):
            return 0
        return 1 if run["head_size"] == head_size else 2

    runs = [run for run in _runs() if str(formats) in run["pairs"]]
    if not runs:
        return None
    nearest = min(runs, key=distance)
    pair = nearest["pairs"][str(formats)]
    return Loss(nearest["model"], nearest["head_size"], pair["kld"], pair["perplexity_ratio"])
