"""Refuses options, and finds those without effect, by the table.

Only the finished `VllmConfig` can be read, so an option counts as given where its value is not
the default.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_metal.options.table import APPLIED, ENVIRONMENT, NO_EFFECT, OPTIONS, UNSEEN, WHOLE, Option

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WITHOUT_FLAG = {
    "model_weights",
    "_api_process_count",
    "_api_process_rank",
    "mamba_config",
    "enable_mm_processor_stats",
}
"""Fields of `EngineArgs` that `vllm serve` has no option for."""

SECRET = {"hf_token"}
"""Options whose value no message shows."""


def flag(name: str) -> str:
    """`max_model_len` -> `--max-model-len`; the field's own name where there is no such option."""
    return name if name in WITHOUT_FLAG else "--" + name.replace("_", "-")


def refusals(vllm_config: "VllmConfig") -> list[str]:
    """One line for each option whose value is not served: the option, its value, the reason."""
    return [
        _refusal(option, value)
        for option, value in _given(vllm_config)
        if option.outcome != NO_EFFECT
    ]


def without_effect(vllm_config: "VllmConfig") -> list[str]:
    """Options and environment variables that are given and change nothing here.

    Only right before vLLM has finished its configuration: it goes on to fill in some of them.
    """
    options = [flag(o.name) for o, _ in _given(vllm_config) if o.outcome == NO_EFFECT]
    return options + [name for name in ENVIRONMENT if os.environ.get(name, "0") not in ("", "0")]


def remove_idle_keys(vllm_config: "VllmConfig") -> None:
    """Takes options without effect out of `additional_config`, where vLLM puts some."""
    given = vllm_config.additional_config
    for option in OPTIONS:
        if option.owner == "additional_config" and isinstance(given, dict):
            given.pop(option.attribute, None)


def _refusal(option: Option, value: Any) -> str:
    hidden = option.name in SECRET or isinstance(value, bool)
    shown = f" {value}" if isinstance(value, str | int | float) and not hidden else ""
    values = [str(v) for v in option.allowed if not isinstance(v, bool)]
    allowed = f" (allowed: {', '.join(values)})" if values else ""
    why = "" if option.outcome == APPLIED else f": {option.why}"
    return f"{flag(option.name)}{shown} is not supported{why}{allowed}"


def _given(vllm_config: "VllmConfig") -> Iterator[tuple[Option, Any]]:
    """Checked options whose value is neither the default nor allowed, with their values."""
    for option in OPTIONS:
        owner = _owner(option, vllm_config)
        if owner is None or (option.outcome == APPLIED and not option.allowed):
            continue
        if option.attribute == WHOLE:
            if _differs(owner, option.set_by_vllm):
                yield option, None
            continue
        value = _value(owner, option.attribute)
        if value in (*option.allowed, *_values_of_the_model(option, vllm_config)):
            continue
        if option.outcome == APPLIED or value != default_of(owner, option.attribute):
            yield option, value


def _owner(option: Option, vllm_config: "VllmConfig") -> Any:
    """The part of the configuration that holds the option; None where there is none."""
    if option.owner == UNSEEN:
        return None
    owner: Any = vllm_config
    for name in option.owner.split(".") if option.owner != "vllm_config" else ():
        owner = getattr(owner, name, None)
    return owner


def _differs(owner: Any, but_for: tuple[str, ...]) -> bool:
    """Whether a part of the configuration has a value that is not the default."""
    names = {field.name for field in dataclasses.fields(owner) if field.init} - set(but_for)
    return any(getattr(owner, name) != default_of(owner, name) for name in names)


def _value(owner: Any, attribute: str) -> Any:
    return owner.get(attribute) if isinstance(owner, dict) else getattr(owner, attribute)


def default_of(owner: Any, attribute: str) -> Any:
    """The default value of a field of one of vLLM's configuration classes; None of anything else,
    such as a key of a dict."""
    fields = {} if isinstance(owner, dict) else {f.name: f for f in dataclasses.fields(owner)}
    if attribute not in fields:
        return None
    field: Any = fields[attribute]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if hasattr(field.default, "get_default"):  # pydantic's FieldInfo
        return field.default.get_default(call_default_factory=True)
    return field.default


def _values_of_the_model(option: Option, vllm_config: "VllmConfig") -> list[Any]:
    """What the model's config.json says for an option that vLLM takes from there."""
    model = vllm_config.model_config
    if model is None:
        return []
    configs = model.hf_config, model.hf_text_config
    return [getattr(config, name, None) for config in configs for name in option.set_by_vllm]
