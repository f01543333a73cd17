"""The table of vLLM's engine options, read from `table.toml`, which says what its keys mean."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APPLIED = "applied"
REFUSED = "refused"
NO_EFFECT = "no_effect"

UNSEEN = "unseen"
"""Stands for the owner of options whose value `VllmConfig` does not tell."""

WHOLE = "*"
"""Stands for the attribute of an option that is a whole part of the configuration."""


@dataclass(frozen=True)
class Option:
    """One field of vLLM's `EngineArgs`."""

    name: str
    outcome: str
    """`APPLIED`, `REFUSED` or `NO_EFFECT`."""
    why: str
    """For the documentation, and behind the option's name in a refusal."""
    owner: str
    """Path of the part of `VllmConfig` that holds the value, or `UNSEEN`."""
    attribute: str
    """The part's name for it, or `WHOLE`."""
    allowed: tuple[Any, ...]
    """Values that are served besides the default. An applied option that has some serves no
    other."""
    set_by_vllm: tuple[str, ...]
    """Attributes that vLLM sets by itself, or takes from the model's config.json."""


def _read(path: Path) -> tuple[tuple[Option, ...], dict[str, str]]:
    data = tomllib.loads(path.read_text())
    options = [
        Option(
            name=name,
            outcome=outcome,
            why=row["why"],
            owner=owner,
            attribute=attribute or name,
            allowed=tuple(row.get("allowed", ())),
            set_by_vllm=tuple(row.get("set_by_vllm", "").split()),
        )
        for outcome in (APPLIED, REFUSED, NO_EFFECT)
        for row in data[outcome]
        for owner, names in row["options"].items()
        for name, _, attribute in (option.partition("=") for option in names.split())
    ]
    return tuple(options), data["environment"]


OPTIONS, ENVIRONMENT = _read(Path(__file__).with_suffix(".toml"))
