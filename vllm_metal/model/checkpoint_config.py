"""A checkpoint's `config.json` with every key that mlx-lm's model of its type reads.

transformers 5 and mlx-lm name some settings differently. What transformers writes is kept, and the
other names are added beside it: `rope_parameters`, aliases such as `num_experts` for
`num_local_experts`, and patterns that `layer_types` replaced.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from mlx_lm.utils import load_config
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from vllm_metal.errors import UserError
from vllm_metal.model.rope_parameters import (
    by_layer_type,
    override_rope,
    scaling,
    with_earlier_keys,
)

TEXT = "text_config"


@dataclass(frozen=True)
class CheckpointConfig:
    """The settings of one checkpoint."""

    written: dict[str, Any]
    """As `config.json` has them, changed by the user's overrides."""
    for_mlx_lm: dict[str, Any]
    """The same, with the keys that mlx-lm reads."""


def read_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> CheckpointConfig:
    """The settings of a folder's `config.json`.

    Args:
        folder: where the file is.
        overrides: what `--hf-overrides` changes.

    Raises:
        UserError: there is no such file, an override would have no effect, or two keys
            contradict each other.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{str(folder)!r} holds no config.json")
    written = _overridden(_with_modelopt(load_config(folder), folder), overrides or {})
    return CheckpointConfig(written, with_mlx_lm_keys(written))


def _with_modelopt(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With what older versions of NVIDIA's ModelOpt write into a file of its own."""
    file = folder / "hf_quant_config.json"
    if "quantization_config" in config or not file.exists():
        return config
    return config | {
        "quantization_config": {"quant_method": "modelopt", **json.loads(file.read_text())}
    }


def with_mlx_lm_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json`, and the one of the language model within it, with the missing keys."""
    filled = _filled(config)
    if isinstance(filled.get(TEXT), dict):
        filled[TEXT] = _filled(filled[TEXT])
    return filled


def _overridden(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As vLLM applies them: a part such as `text_config` is merged, all else is replaced."""
    ineffective = [
        f"{key}: the model reads {TEXT}.{key}; "
        f'write {{"{TEXT}": {{"{key}": ...}}}} in --hf-overrides'
        for key in overrides
        if key not in config and key in (config.get(TEXT) or {})
    ]
    if ineffective:
        raise UserError("--hf-overrides would have no effect", ineffective)
    changed = override_rope(config, overrides)
    for key, value in overrides.items():
        part = config.get(key)
        if key.endswith("_config") and isinstance(value, Mapping) and isinstance(part, dict):
            changed[key] = _overridden(part, value)
    return changed


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    filled = with_earlier_keys(config)
    model_type = filled.get("model_type", "")
    for alias, name in _aliases(model_type).items():
        if filled.get(alias) is None and name in filled:
            filled[alias] = filled[name]
    for key, pattern in _patterns(filled):
        if filled.get(key) is None:
            filled[key] = pattern
    return filled | _OWN_NAMES.get(model_type, lambda config: {})(filled)


def transformers_class(model_type: str) -> type[PretrainedConfig] | None:
    """transformers' own class of a type's settings; None where it has none.

    vLLM registers classes of its own over some of them, which `AutoConfig` then gives instead.
    """
    name = CONFIG_MAPPING_NAMES.get(model_type)
    if name is None:
        return None
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattr(module, name, None) or getattr(transformers, name)


def _aliases(model_type: str) -> Mapping[str, str]:
    """transformers' other names of the keys that it writes for a type, by the other name."""
    read_by = transformers_class(model_type)
    return read_by.attribute_map if read_by else {}


def _patterns(config: Mapping[str, Any]) -> Sequence[tuple[str, int]]:
    """The key that `layer_types` replaced, and its value: every how many layers one is full.

    Nothing where the layers repeat in no such way. mlx-lm's model then takes a default, and the
    comparison with `layer_types` after loading refuses it.
    """
    layer_types = config.get("layer_types") or ()
    full = [index + 1 for index, name in enumerate(layer_types) if name == "full_attention"]
    period = full[0] if full else len(layer_types) + 1
    if full != list(range(period, len(layer_types) + 1, period)):
        return []
    keys = {
        "sliding_attention": "sliding_window_pattern",
        "linear_attention": "full_attention_interval",
    }
    return [(key, period) for name, key in keys.items() if name in layer_types]


def _granitemoehybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm reads the layer types under the names of before transformers 5.13.

    Without a type of position embedding transformers has none, and mlx-lm has rotary ones.
    """
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    return {
        "layer_types": [names.get(name, name) for name in config.get("layer_types") or ()],
        "position_embedding_type": config.get("position_embedding_type") or "nope",
    }


def _exaone4(config: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm reads the pattern as a text such as LLLG, for three local layers and a global one."""
    period = config.get("sliding_window_pattern")
    if not isinstance(period, int):
        return {}
    return {"sliding_window_pattern": "L" * (period - 1) + "G" if period else None}


def _gemma4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with full attention may have another size and number of heads."""
    layer_types = config.get("layer_types") or ()
    given = {int(layer): values for layer, values in (config.get("per_layer_config") or {}).items()}
    full = {i: given.get(i, {}) for i, name in enumerate(layer_types) if name == "full_attention"}
    changes = list(full.values())
    if not given or set(given) - set(full) or changes.count(changes[0]) != len(changes):
        return {}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {
        name: changes[0].get(key, config[key])
        for key, name in names.items()
        if config.get(name) is None and key in config
    }


def _step3p5(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding layers may have other heads; mlx-lm reads lists with one entry for each layer."""
    layer_types = config.get("layer_types") or ()
    found: dict[str, Any] = {}
    if config.get("num_sliding_attention_heads"):
        found["attention_other_setting"] = {
            "num_attention_heads": config["num_sliding_attention_heads"],
            "num_attention_groups": config["num_key_value_heads"],
        }
    if "mlp_layer_types" in config:
        sparse = [i for i, name in enumerate(config["mlp_layer_types"]) if name == "sparse"]
        found["moe_layers_enum"] = ",".join(map(str, sparse))
    rope = by_layer_type(config.get("rope_parameters") or {})
    if rope.keys() >= set(layer_types) and rope:
        of_layer = [rope[name] for name in layer_types]
        found["rope_theta"] = [values["rope_theta"] for values in of_layer]
        found["partial_rotary_factors"] = [v.get("partial_rotary_factor", 1.0) for v in of_layer]
        found["yarn_only_types"] = [name for name, values in rope.items() if scaling(values)]
    return found


_OWN_NAMES = {
    "granitemoehybrid": _granitemoehybrid,
    "exaone4": _exaone4,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
    "step3p5": _step3p5,
}
"""Keys of single model types, from the configuration filled so far."""
