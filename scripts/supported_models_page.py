"""The page `docs/supported_models.md`, a function of the results alone."""

import re
from collections.abc import Sequence
from typing import Any

_INTRODUCTION = """\
# Supported models

Written by `scripts/supported_models.py`; do not edit. mlx-lm {mlx_lm} has {total} model files. For
each one the script builds a tiny random float32 model with every kind of layer the architecture
has, serves it three requests of unequal length through the plugin's own binding and pages, and
compares all logits with those of mlx-lm's own caches. Prompts come in unequal chunks that cross
the sliding windows; the requests are then decoded together, in blocks that had another owner.

| | {head} |
| --- | {rule} |
| dense | {dense} |
| TurboQuant | {turboquant} |

- *Dense* is served where no logit differs from mlx-lm's by more than 3e-5 standard deviations; the
  largest difference found is {dense_difference:.0e}.
- *TurboQuant* is served where the logits, with `q8_0/q4_0` and with `q4_0/q4_0`, are those of
  mlx-lm's own caches with keys and values through the codec: within 1e-4 standard deviations for
  the better half of the tokens, and for all within a tenth of what the codec itself does, since a
  rounding error now and then tips a code over; and where a request gets, to the bit, the logits
  that it gets alone. What the codec costs a real model is in [TurboQuant](turboquant.md).
- *One at a time*: the model takes one position for all rows of a forward, so decode runs one
  request after the other. This is found at start and needs no setting.
- A refused model is refused by name when the server starts, with the reason given here.

Not served with any model, and refused when asked for: LoRA adapters, images and other multi-modal
inputs (of *text part* models the language model is served), embeddings and pooling, speculative
decoding.

"""

_TABLE_HEAD = """\
| model file | kind | dense | TurboQuant | reasons and notes |
| --- | --- | --- | --- | --- |
"""

_FOOTER = """
mlx-lm runs these model types with another type's file: {aliases}.

*Kinds.* MLA: multi-head latent attention. MoE: mixture of experts. Hybrid: attention and recurrent
state. Shared KV: some layers read the keys and values of others. Own attention: attention that is
not, or not in every layer, mlx-lm's `scaled_dot_product_attention`. Own cache: a cache that mlx-lm
defines for this model alone. Text part: the file holds a language model taken out of a multi-modal
one. No kind: a plain decoder with full attention.
"""

_STATUSES = ("served", "refused", "nothing to compress", "not checked", "wrong")


def page(results: dict[str, Any]) -> str:
    """Markdown."""
    architectures = results["architectures"]
    found = {result[mode]["status"] for result in architectures.values() for mode in _MODES}
    statuses = [status for status in _STATUSES if status in found]
    head = _INTRODUCTION.format(
        mlx_lm=results["versions"]["mlx-lm"],
        total=len(architectures),
        head=" | ".join(statuses),
        rule=" | ".join(["---"] * len(statuses)),
        **{mode: _counts(architectures.values(), mode, statuses) for mode in _MODES},
        **{f"{mode}_difference": _largest(architectures.values(), mode) for mode in _MODES},
    )
    rows = "".join(_row(name, result) for name, result in architectures.items())
    aliases = ", ".join(f"`{alias}` ({file})" for alias, file in results["aliases"].items())
    return head + _TABLE_HEAD + rows + _FOOTER.format(aliases=aliases)


_MODES = ("dense", "turboquant")


def _counts(results: Any, mode: str, statuses: Sequence[str]) -> str:
    found = [result[mode]["status"] for result in results]
    return " | ".join(str(found.count(status)) for status in statuses)


def _largest(results: Any, mode: str) -> float:
    served = [r[mode]["difference"] for r in results if r[mode]["status"] == "served"]
    return max(served, default=0.0)


def _row(name: str, result: dict[str, Any]) -> str:
    cells = [f"`{name}`", ", ".join(result["kinds"])]
    cells += [_status(result[mode]) for mode in _MODES]
    cells.append("; ".join(filter(None, [_reasons(result), *result["notes"]])))
    return f"| {' | '.join(cells)} |\n"


def _status(outcome: dict[str, Any]) -> str:
    if outcome["status"] == "wrong":
        return "**wrong**"
    if outcome.get("batched_decode") is False:
        return f"{outcome['status']}, one at a time"
    return outcome["status"]


def _reasons(result: dict[str, Any]) -> str:
    dense, turboquant = (_merged(result[mode].get("reasons", [])) for mode in _MODES)
    if not turboquant or dense == turboquant:
        text = dense
    elif not dense:
        text = f"TurboQuant: {turboquant}"
    else:
        text = f"dense: {dense}; TurboQuant: {turboquant}"
    return text.replace("|", "\\|").replace("\n", " ")


def _merged(reasons: Sequence[str]) -> str:
    """The reasons in one line; what several layers have in common is said once."""
    layers: dict[str, list[str]] = {}
    for reason in reasons:
        match = re.fullmatch(r"layer (\d+(?: and \d+ more)?):? (.*)", reason, re.DOTALL)
        layer, text = match.groups() if match else ("", reason)
        layers.setdefault(text, []).extend([layer] if layer else [])
    return "; ".join(
        f"{text} (layer{'s' * (len(numbers) > 1)} {', '.join(numbers)})" if numbers else text
        for text, numbers in layers.items()
    )
