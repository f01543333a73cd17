"""Measured loss of each format pair, as shown by the start-up report, `plan` and the docs.

The figures come from `measured_loss.json`, written by `vllm-metal eval ... --output`: one model,
one text, one run. They order the formats; another model loses more or less.
"""

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
            "q4_0/q2_0",
            "q3_0/q3_0",
        ),
    )
)
"""The one list of pairs that are measured and shown, from most to fewest bytes."""

WARN_KEY_BITS = 5
"""Keys of fewer bits are warned about."""
WARN_VALUE_BITS = 3
"""Values of fewer bits are warned about."""


@dataclass(frozen=True)
class Loss:
    """What a pair lost in the committed run."""

    model: str
    kld: float
    """Mean KL divergence of the next-token distribution from the dense cache's, in nats."""
    perplexity_ratio: float

    def __str__(self) -> str:
        percent = 100 * (self.perplexity_ratio - 1)
        return f"KLD {self.kld:.4f}, perplexity {percent:+.1f} % ({self.model})"


@cache
def _results() -> dict:
    return json.loads(RESULTS.read_text())


def warning(formats: FormatPair) -> str | None:
    """What to tell a user of a pair with few bits; None for the others."""
    if formats.key.bits >= WARN_KEY_BITS and formats.value.bits >= WARN_VALUE_BITS:
        return None
    loss = measured_loss(formats)
    return (
        f"k_quant {formats.key.name}, v_quant {formats.value.name} change the model's answers "
        f"noticeably: {loss or 'the loss of this pair has not been measured'}"
    )


def log(formats: FormatPair, logger: logging.Logger) -> None:
    """Warns of a pair with few bits; gives the measured loss of another one where there is one."""
    if text := warning(formats):
        logger.warning("TurboQuant: %s", text)
    elif loss := measured_loss(formats):
        logger.info("TurboQuant %s, measured loss: %s", formats, loss)


def measured_loss(formats: FormatPair) -> Loss | None:
    """The committed measurement of a pair, or None."""
    results = _results()
    pair = results["pairs"].get(str(formats))
    if pair is None:
        return None
    return Loss(results["model"], pair["kld"], pair["perplexity_ratio"])
