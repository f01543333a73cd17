"""Measured loss of each format pair, as shown by the start-up report, `plan` and the docs.

The figures come from `measured_loss.json`, written by `vllm-metal eval ... --output`: one model,
one text, one run. They order the formats; another model loses more or less.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format

RESULTS = Path(__file__).with_name("measured_loss.json")

FORMAT_PAIRS = (
    ("q8_0", "q8_0"),
    ("q8_0", "q4_0"),
    ("q8_0", "q3_0"),
    ("q6_0", "q6_0"),
    ("q6_0", "q4_0"),
    ("q5_0", "q4_0"),
    ("q5_0", "q3_0"),
    ("q4_0", "q4_0"),
    ("q4_0", "q3_0"),
    ("q4_0", "q2_0"),
    ("q3_0", "q3_0"),
)
"""Pairs (k_quant, v_quant) that are measured and shown, from most to fewest bytes."""

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
    if not RESULTS.exists():
        return {"model": "", "pairs": {}}
    return json.loads(RESULTS.read_text())


def warning(k_quant: str, v_quant: str) -> str | None:
    """What to tell a user of a pair with few bits; None for the others."""
    key_bits, value_bits = key_format(k_quant).bits, value_format(v_quant).bits
    if key_bits >= WARN_KEY_BITS and value_bits >= WARN_VALUE_BITS:
        return None
    loss = measured_loss(k_quant, v_quant)
    return f"k_quant {k_quant}, v_quant {v_quant} lose visibly: {loss or 'not measured'}"


def measured_loss(k_quant: str, v_quant: str) -> Loss | None:
    """The committed measurement of a pair, or None."""
    results = _results()
    pair = results["pairs"].get(f"{k_quant}/{v_quant}")
    if pair is None:
        return None
    return Loss(results["model"], pair["kld"], pair["perplexity_ratio"])
