"""Rotary embeddings in `config.json`: the one key of transformers 5 and the many keys before it.

transformers 5 writes all that concerns rotary embeddings under one key,

    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}

or, where the layers of a model differ, one such dictionary for each layer type:

    "rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}

Earlier versions wrote `rope_theta`, `rope_scaling`, `partial_rotary_factor`, `rope_local_base_freq`
and other keys, and these are what most models of mlx-lm read. A key that a model of mlx-lm misses
takes a default value, so the model computes without a word, and wrong.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_metal.errors import UserError

THETA_KEYS = ("rope_theta", "rotary_emb_base")
SLIDING_THETA_KEYS = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct")
"""Earlier names of `rope_theta`, of `rope_theta` in sliding windows, of `partial_rotary_factor`."""

_EARLIER_KEYS = {*THETA_KEYS, *SLIDING_THETA_KEYS, *PARTIAL_KEYS, "rope_scaling", "rotary_dim"}

UNSCALED_TYPES = ("default", "mrope")
"""Types whose frequencies are those of `rope_theta` alone. The positions of `mrope` are three
numbers, which are equal in text."""

_SAME_TYPES = {"su": "longrope", "mrope": "default"}
_NOT_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def with_earlier_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the earlier keys that `rope_parameters` determines and it lacks.

    Args:
        config: one level of a `config.json`: the file itself or its `text_config`.

    Raises:
        UserError: an earlier key and `rope_parameters` contradict each other.
    """
    parameters = config.get("rope_parameters")
    if not parameters:
        return dict(config)
    earlier: dict[str, Any] = {}
    for where, key, value in _earlier_keys(config, parameters):
        given = config.get(key)
        if given is None:
            earlier.setdefault(key, value)
        elif not _agree(key, given, value):
            raise UserError(
                "config.json contradicts itself",
                [f"{key} is {_shown(given)}, but {where} is {_shown(value)}; remove one of them"],
            )
    return {**config, **earlier}


def override_rope(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `overrides` in place of the same keys, in whichever form they are.

    What is said in the other form is changed too, so that the two do not contradict each other.

    Raises:
        UserError: an earlier key is to replace one of several `rope_parameters`.
    """
    changed = {**config, **overrides}
    if "rope_parameters" in overrides:
        old = earlier_as_parameters(config)
        kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
        new = overrides["rope_parameters"]
        if not by_layer_type(new):
            changed["rope_parameters"] = {**kept, **new}
        dropped = _EARLIER_KEYS - overrides.keys()
        return {key: value for key, value in changed.items() if key not in dropped}
    for keys in (THETA_KEYS, PARTIAL_KEYS):
        values = [overrides[key] for key in keys if key in overrides]
        changed |= {key: values[0] for key in keys if values and key in config}
    given = {key: overrides[key] for key in _EARLIER_KEYS if key in overrides}
    written: Any = config.get("rope_parameters")
    if not given or not written:
        return changed
    if by_layer_type(written):
        raise UserError(
            "--hf-overrides cannot be applied",
            [
                f"{key}: config.json has one rope_parameters for each layer type; "
                "override rope_parameters"
                for key in given
            ],
        )
    if "rope_scaling" in given:
        unscaled = ("rope_theta", "partial_rotary_factor")
        written = {key: written[key] for key in unscaled if key in written}
    rest = {key: value for key, value in changed.items() if key not in given}
    return rest | {"rope_parameters": {**written, **earlier_as_parameters(given)}}


def earlier_as_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says about rotary embeddings, as flat `rope_parameters`.

    Empty where it says nothing.
    """
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    found = dict(config.get("rope_scaling") or {})
    levels = [config, config.get("attn_config") or {}]  # DBRX has them in a part
    for name, keys in (("rope_theta", THETA_KEYS), ("partial_rotary_factor", PARTIAL_KEYS)):
        values = [part[key] for part in levels for key in keys if part.get(key) is not None]
        if values:
            found[name] = values[0]
    return found


def by_layer_type(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The nested dictionaries of `rope_parameters`, by layer type; empty where it is flat.

    Some checkpoints have numbers beside the dictionaries, which transformers and vLLM ignore too.
    """
    return {name: value for name, value in parameters.items() if isinstance(value, dict)}


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type of scaling, under its name in transformers 5."""
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    return _SAME_TYPES.get(name, name)


def scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The earlier `rope_scaling` of flat parameters; None where nothing is scaled.

    Some models of mlx-lm read the type as `type` and some as `rope_type`.
    """
    name = rope_type(parameters)
    if name in UNSCALED_TYPES:
        return None
    rest = {key: value for key, value in parameters.items() if key not in _NOT_SCALING}
    return {"type": name, "rope_type": name, **rest}


def _earlier_keys(
    config: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    """(where the value stands, the earlier key, the value)."""
    nested = by_layer_type(parameters)
    if not nested:
        yield from _flat_keys(config, parameters, "rope_parameters")
        return
    main = "full_attention" if "full_attention" in nested else next(iter(nested))
    partial = {values.get("partial_rotary_factor") for values in nested.values()}
    for where, key, value in _flat_keys(config, nested[main], f"rope_parameters.{main}"):
        if len(partial) == 1 or key not in (*PARTIAL_KEYS, "rotary_dim"):
            yield where, key, value
    theta = nested.get("sliding_attention", {}).get("rope_theta")
    if theta is not None:
        for key in SLIDING_THETA_KEYS:
            yield "rope_parameters.sliding_attention.rope_theta", key, theta


def _flat_keys(
    config: Mapping[str, Any], parameters: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str, Any]]:
    for name, keys in (("rope_theta", THETA_KEYS), ("partial_rotary_factor", PARTIAL_KEYS)):
        if (value := parameters.get(name)) is not None:
            for key in keys:
                yield f"{where}.{name}", key, value
    given, scaled = config.get("rope_scaling"), scaling(parameters)
    if scaled or not given or rope_type(given) not in UNSCALED_TYPES:
        yield where, "rope_scaling", scaled
    if (length := parameters.get("original_max_position_embeddings")) is not None:
        yield f"{where}.original_max_position_embeddings", _ORIGINAL_LENGTH, length
    head_dim, partial = config.get("head_dim"), parameters.get("partial_rotary_factor", 1.0)
    if head_dim is not None and config.get("rotary_dim") is None:
        yield where, "rotary_dim", int(head_dim * partial)


_ORIGINAL_LENGTH = "original_max_position_embeddings"


def _agree(key: str, given: Any, value: Any) -> bool:
    """Whether two values of one setting are the same; of `rope_scaling`, in what both name."""
    if key == "rope_scaling" and rope_type(given) != rope_type(value or {}):
        return False
    if isinstance(given, Mapping) and isinstance(value, Mapping):
        common = (given.keys() & value.keys()) - set(_NOT_SCALING)
        return all(_agree(name, given[name], value[name]) for name in common)
    if isinstance(given, list | tuple) and isinstance(value, list | tuple):
        return len(given) == len(value) and all(map(_agree, [key] * len(given), given, value))
    if isinstance(given, int | float) and isinstance(value, int | float):
        return math.isclose(given, value, rel_tol=1e-6)
    return given == value


def _shown(value: Any) -> str:
    """A value in a message; a long list would hide the rest of it."""
    text = "of type default" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
