"""The page `docs/supported_models.md`, a function of the results alone."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_metal.model.weight_formats import ANY, SERVED, Format

Results = Mapping[str, Mapping[str, Any]]
"""By model file: its kinds and notes, and the outcome with dense pages and with TurboQuant."""

_INTRODUCTION = """\
# Supported models

mlx-lm {mlx_lm} has {total} model files. `scripts/supported_models.py` checks each of them and
writes this page. It builds a tiny random float32 model with every kind of layer that the
architecture has, and serves it three requests of unequal length through the plugin's own binding
and pages. All logits are compared with those of mlx-lm's own caches. Prompts come in unequal chunks
that cross the sliding windows. The requests are then decoded together, in blocks that belonged to
other requests before.

| | {head} |
| --- | {rule} |
| dense | {dense} |
| TurboQuant | {turboquant} |

- *Dense pages*: a model is served if no logit differs from mlx-lm's by more than 3e-5 standard
  deviations. The largest difference found is {dense_difference:.0e}.
- *TurboQuant*: a model is served if its logits, with `q8_0/q4_0` and with `q4_0/q4_0`, are those of
  mlx-lm's own caches with keys and values passed through the codec: within 1e-4 standard deviations
  for the better half of the tokens, and for all tokens within a tenth of what the codec itself
  changes, because a rounding error now and then changes a code. Also, a request must get the same
  logits, to the bit, as it gets alone. What the codec costs a real model is in
  [TurboQuant](turboquant.md#what-it-costs).
- *One at a time*: the model takes one position for all rows of a forward pass, so decode runs one
  request after the other. The server finds this out at start; it needs no setting.
- *Refused*: the server refuses the model by name when it starts, for one of the
  [reasons below](#why-a-model-is-refused-or-not-checked).

The following is not supported for any model, and refused: LoRA adapters, embeddings and pooling,
and images and other multi-modal inputs. Of *text part* models the language model is served.
[Speculation](speculation.md) is for models without recurrent state that are not *one at a time*.

## All model files

| model file | kind | dense | TurboQuant |
| --- | --- | --- | --- |
"""

_REASONS = """
## Why a model is refused or not checked

"""

_NOTES = """
## Notes

"""

_ALIASES = """
## Model types without a file of their own

mlx-lm runs these model types with the file of another:

"""

_FORMATS = """
## Weight formats

Unquantised weights and MLX's own formats (`quantization` in `config.json`) are served for every
model. Of the formats of others, which `quantization_config` names, those in this table are served.
A test makes a checkpoint in each of them, for each model type that the table names, and compares
the logits with those of the dequantised weights in float32. All other formats are refused by name
at start.

| format | model types | in memory | notes |
| --- | --- | --- | --- |
"""

_KINDS = """
## Kinds

| kind | meaning |
| --- | --- |
| (none) | a plain decoder with full attention |
| chunked attention | a query sees only the tokens of its own chunk of the sequence |
| hybrid | some layers have attention, others recurrent state |
| MLA | multi-head latent attention; some files cache the latent, others keys and values |
| mixed head sizes | layers differ in their head size or number of KV heads |
| MoE | mixture of experts |
| own attention | in some layers or all, attention is not mlx-lm's `scaled_dot_product_attention` |
| own cache | a cache class that mlx-lm defines for this model alone |
| recurrent state only | no attention layers |
| shared KV | some layers read the keys and values of others |
| sinks | attention sinks: a logit without a value in each head |
| sliding window | some layers, or all, see only the last tokens |
| text part | the file holds the language model of a multi-modal one |
"""

_STATUSES = ("served", "refused", "nothing to compress", "not checked", "wrong")
_MODES = {"dense": "dense pages", "turboquant": "TurboQuant"}


def page(results: Mapping[str, Any]) -> str:
    """Markdown."""
    architectures = results["architectures"]
    found = {result[mode]["status"] for result in architectures.values() for mode in _MODES}
    statuses = [status for status in _STATUSES if status in found]
    text = _INTRODUCTION.format(
        mlx_lm=results["versions"]["mlx-lm"],
        total=len(architectures),
        head=" | ".join(statuses),
        rule=" | ".join(["---"] * len(statuses)),
        **{mode: _counts(architectures.values(), mode, statuses) for mode in _MODES},
        **{f"{mode}_difference": _largest(architectures.values(), mode) for mode in _MODES},
    )
    text += "".join(_row(name, result) for name, result in architectures.items())
    reasons = [
        f"{sentence} Model files: {_names(names)}." for sentence, names in _reasons(architectures)
    ]
    notes = [f"{_names(names)}: {note}." for note, names in _notes(architectures).items()]
    text += _section(_REASONS, reasons) + _section(_NOTES, notes)
    aliases = (f"`{alias}` with `{file}`" for alias, file in results["aliases"].items())
    text += _ALIASES + _wrapped(", ".join(aliases) + ".") + _FORMATS
    return text + "".join(_format(name, known) for name, known in SERVED.items()) + _KINDS


def _format(name: str, known: Format) -> str:
    types = known.model_types if known.model_types == ANY else _names(known.model_types)
    return f"| {name} | {types} | {known.memory} | {known.note} |\n"


def _counts(results: Any, mode: str, statuses: Sequence[str]) -> str:
    found = [result[mode]["status"] for result in results]
    return " | ".join(str(found.count(status)) for status in statuses)


def _largest(results: Any, mode: str) -> float:
    served = [r[mode]["difference"] for r in results if r[mode]["status"] == "served"]
    return max(served, default=0.0)


def _row(name: str, result: Mapping[str, Any]) -> str:
    cells = [f"`{name}`", ", ".join(result["kinds"])]
    cells += [_status(result[mode]) for mode in _MODES]
    return f"| {' | '.join(cells)} |\n"


def _status(outcome: Mapping[str, Any]) -> str:
    if outcome["status"] == "wrong":
        return "**wrong**"
    if outcome.get("batched_decode") is False:
        return f"{outcome['status']}, one at a time"
    return outcome["status"]


def _reasons(architectures: Results) -> Iterator[tuple[str, list[str]]]:
    """Each reason, with the modes that it concerns, and the model files that it holds for."""
    models: dict[str, dict[str, list[str]]] = {}
    for name, result in architectures.items():
        for mode in _MODES:
            for reason in dict.fromkeys(map(_general, result[mode].get("reasons", []))):
                models.setdefault(reason, {}).setdefault(name, []).append(_MODES[mode])
    for reason, by_name in models.items():
        by_modes: dict[str, list[str]] = {}
        for name, modes in by_name.items():
            by_modes.setdefault(" and ".join(modes), []).append(name)
        for joined, names in by_modes.items():
            yield f"*{joined[0].upper()}{joined[1:]}*: {reason}.", names


def _notes(architectures: Results) -> dict[str, list[str]]:
    """Each note, and the model files that it is about."""
    models: dict[str, list[str]] = {}
    for name, result in architectures.items():
        for note in result["notes"]:
            models.setdefault(note, []).append(name)
    return models


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _general(reason: str) -> str:
    """A reason without the numbers of layers, which are those of the tiny model."""
    match = re.fullmatch(r"layer \d+(?: and \d+ more)?(:?) (.*)", reason, re.DOTALL)
    if match:
        colon, reason = match.groups()
        reason = reason if colon else f"a layer {reason}"
    return reason.replace("\n", " ")


def _section(heading: str, items: Sequence[str]) -> str:
    """A list under a heading; nothing where it would be empty."""
    return heading + "".join(_wrapped(item, "- ") for item in items) if items else ""


def _wrapped(text: str, bullet: str = "") -> str:
    return (
        textwrap.fill(
            text,
            100,
            initial_indent=bullet,
            subsequent_indent=" " * len(bullet),
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
    )
