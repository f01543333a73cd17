"""Compares a model that mlx-lm built with what `config.json` says, as transformers reads it.

mlx-lm and transformers read the same file independently. Where mlx-lm misses a key, it computes
with a default value and gives no sign of it. What is compared is what can be seen on the built
model: the frequencies of every rotary embedding, how many dimensions it rotates, and the window of
every layer.

Not seen: models that compute positions without a module that holds frequencies (GPT-2's learned
positions, ALiBi), scales of attention, and factors on the queries and keys other than YaRN's.
"""

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, initialize_rope
from transformers import PretrainedConfig

from vllm_metal.errors import UserError
from vllm_metal.model.checkpoint_config import transformers_class
from vllm_metal.model.layer_kinds import AttentionKind, cache_kinds
from vllm_metal.model.rope_parameters import (
    SLIDING_THETA_KEYS,
    UNSCALED_TYPES,
    by_layer_type,
    earlier_as_parameters,
    rope_type,
)

logger = logging.getLogger("vllm.metal.model")

_RELATIVE_TOLERANCE = 1e-4
"""Of frequencies: float32 against float32, computed in another order."""


def check_built_model(
    model: nn.Module, written: Mapping[str, Any], max_model_len: int | None = None
) -> None:
    """Refuses a model whose layers are not those of its `config.json`.

    Args:
        model: what mlx-lm built; its weights are not read.
        written: the settings of `config.json`, without keys added for mlx-lm.
        max_model_len: tokens of the longest request. A window that is at least as long is no
            difference. None: windows are not compared.

    Raises:
        UserError: naming the key, the value and the layers.
    """
    text = dict(written.get("text_config") or written)
    config = _as_transformers_reads(written) or text
    differences = list(_rope_differences(model, text, config))
    if max_model_len is not None:
        differences += _window_differences(model, config, max_model_len)
    layers: dict[str, list[int]] = {}
    for difference, layer in differences:
        layers.setdefault(difference, []).append(layer)
    if layers:
        raise UserError(
            "mlx-lm would not compute what config.json says, so the checkpoint is not served",
            [f"{text} (layers {_listed(numbers)})" for text, numbers in layers.items()],
        )


def _as_transformers_reads(written: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of the language model, with transformers' defaults and derived values.

    None where transformers does not know the type or cannot read the file.
    """
    model_type = written.get("model_type")
    read_by = transformers_class(model_type) if isinstance(model_type, str) else None
    if read_by is None:
        return None
    try:
        read = read_by.from_dict(copy.deepcopy(dict(written))).get_text_config()
    except Exception as error:  # a config class may raise anything
        logger.info("transformers cannot read config.json (%s); it is compared as written", error)
        return None
    if not isinstance(read, PretrainedConfig) or (
        read.model_type != model_type and "text_config" not in written
    ):
        return None  # a default part that is not in the file
    return {**read.__dict__, **read.to_dict()}  # `to_dict` leaves out what is derived


def _readings(text: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`rope_parameters` as transformers reads them, and with the earlier keys of the file.

    For a few types transformers leaves out what an earlier key says. A model may have either.
    """
    read = earlier_as_parameters(config)
    if text.get("rope_parameters"):
        return [read]
    said, nested = earlier_as_parameters(text), by_layer_type(read)
    if not nested:
        return [read, {**read, **said}]
    partial = {key: said[key] for key in ("partial_rotary_factor",) if key in said}
    local = [{"rope_theta": text[k]} for k in SLIDING_THETA_KEYS if text.get(k) is not None]
    same = {key: said[key] for key in ("rope_theta",) if key in said}  # in windows, too
    return [read] + [
        {
            name: {**values, **(said if name == "full_attention" else {**partial, **theta})}
            for name, values in nested.items()
        }
        for theta in (local[:1] or [{}, same])
    ]


def _listed(layers: list[int]) -> str:
    """Layers in a message; the first ten tell which they are."""
    numbers = sorted(set(layers))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ", ".join(map(str, numbers[:10])) + more


def _rope_differences(
    model: nn.Module, text: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """(what differs, layer)."""
    if config.get("compress_rope_theta"):
        return  # DeepSeek-V4's layers choose between two by a rule of their own
    readings = _readings(text, config)
    layer_types = config.get("layer_types") or ()
    for layer, module in _rope_modules(model):
        layer_type = layer_types[layer] if layer < len(layer_types) else ""
        found = [
            _rope_difference(module, *_of_layer(reading, layer, layer_type), config)
            for reading in readings
        ]
        if found[0] is not None and all(found):
            yield found[0], layer


def _rope_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(layer, module) of every rotary embedding; the layer is the first number in its name."""
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", name)
        if number and _frequencies(module) is not None:
            yield int(number[1]), module


def _of_layer(
    parameters: Mapping[str, Any], layer: int, layer_type: str
) -> tuple[Mapping[str, Any], str]:
    """Parameters of one layer, and the key that has them."""
    nested = by_layer_type(parameters)
    found = nested.get(layer_type, {}) if nested else parameters
    theta = found.get("rope_theta")
    if isinstance(theta, list):  # one for each layer
        found = {**found, "rope_theta": theta[layer]}
    return found, f"rope_parameters.{layer_type}" if nested else "rope_parameters"


def _rope_difference(
    module: nn.Module, expected: Mapping[str, Any], key: str, config: Mapping[str, Any]
) -> str | None:
    """What differs between a rotary embedding and its parameters; None where nothing does."""
    theta, partial = expected.get("rope_theta"), expected.get("partial_rotary_factor")
    if not theta:
        return None
    dims = _dims(module)
    if partial is not None and rope_type(expected) != "proportional":
        sizes = {int(size * partial) for size in _head_sizes(config)}
        if dims not in sizes | {config.get("qk_rope_head_dim")}:
            return f"{key}.partial_rotary_factor is {partial}, but the model rotates {dims} numbers"
    right = _built(dims, expected, config)
    if right is not None and _same_rope(module, right, expected):
        return None
    if right is None and type(module) is not nn.RoPE:
        return None  # a scaling that mlx-lm's model knows and rope_utils does not
    scaled = rope_type(expected) not in UNSCALED_TYPES
    shown = {"rope_type": rope_type(expected)} if scaled else {}
    shown |= {name: expected[name] for name in ("rope_theta", "factor") if name in expected}
    said = ", ".join(f"{name} is {value}" for name, value in shown.items())
    return f"in {key}, {said}, but the model computes with {_described(module)}"


def _head_sizes(config: Mapping[str, Any]) -> set[int]:
    """Sizes that a head of the model may have."""
    heads = config.get("num_attention_heads") or 1
    given = [config.get(key) for key in ("head_dim", "qk_head_dim", "index_head_dim")]
    given += [config["hidden_size"] // heads] if config.get("hidden_size") else []
    layers = (config.get("per_layer_config") or {}).values()
    given += [values.get("head_dim") for values in layers if isinstance(values, Mapping)]
    return {size for size in given if size}


def _built(dims: int, expected: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module | None:
    """What mlx-lm's own `initialize_rope` makes of the parameters; None where it cannot."""
    theta, name = expected["rope_theta"], rope_type(expected)
    if alpha := expected.get(
        "alpha"
    ):  # Hunyuan's dynamic scaling: another base, whatever the length
        theta, name = theta * alpha ** (dims / (dims - 2)), "default"
    scaled = None if name in UNSCALED_TYPES else {**expected, "type": name}
    length = config.get("max_position_embeddings")
    try:
        return initialize_rope(dims, theta, False, scaled, length)
    except (KeyError, TypeError, ValueError):
        return None


def _same_rope(module: nn.Module, right: nn.Module, expected: Mapping[str, Any]) -> bool:
    found, wanted = _frequencies(module), _frequencies(right)
    if found is None or wanted is None:
        return False
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=_RELATIVE_TOLERANCE):
        return False
    if rope_type(expected) != "yarn":
        return True
    wanted_scale: Any = expected.get("attention_factor") or getattr(right, "mscale", 1.0)
    scale: Any = getattr(module, "mscale", 1.0)
    return bool(np.isclose(float(scale), float(wanted_scale), rtol=_RELATIVE_TOLERANCE))


def _dims(module: nn.Module) -> int:
    """Numbers of a head that a rotary embedding rotates."""
    dims = getattr(module, "dims", None) or getattr(module, "dim", None)
    frequencies = _frequencies(module)
    return dims or (0 if frequencies is None else 2 * len(frequencies))


def _frequencies(module: nn.Module) -> np.ndarray | None:
    """Positions per radian of each pair of numbers, as MLX's `rope` takes them.

    For a base that grows with the length of a request, the three numbers that determine it. None
    where the module is no rotary embedding that is known.
    """
    if type(module) is DynamicNTKScalingRoPE:
        return np.array([module.base, module.factor, module.max_position_embeddings], np.float64)
    if type(module) is nn.RoPE:
        return module.base ** (np.arange(0, module.dims, 2) / module.dims) / module.scale
    given = getattr(module, "_freqs", None)
    given = getattr(module, "_rope_freqs", None) if given is None else given
    return None if given is None else np.abs(np.array(given.astype(mx.float32)))


def _described(module: nn.Module) -> str:
    if type(module) is nn.RoPE:
        scaled = f" and positions times {module.scale:g}" if module.scale != 1 else ""
        return f"rope_theta {module.base:g}{scaled}"
    if type(module) is DynamicNTKScalingRoPE:
        return f"rope_theta {module.base:g} and dynamic scaling by {module.factor:g}"
    return f"another {type(module).__name__}"


_WINDOW_IN_EVERY_LAYER = "ministral3 mistral mixtral phi3 phimoe qwen3_moe starcoder2".split()
"""Types whose `sliding_window`, where there is one, holds for all layers."""


def _window_differences(
    model: nn.Module, config: Mapping[str, Any], max_model_len: int
) -> Iterator[tuple[str, int]]:
    """(what differs, layer)."""
    layer_types = config.get("layer_types")
    if layer_types is None and config.get("model_type") in _WINDOW_IN_EVERY_LAYER:
        layer_types = ["sliding_attention"] * config["num_hidden_layers"]
    arrangement, _ = cache_kinds(model)
    shared = config.get("num_kv_shared_layers") or 0
    if not layer_types or len(arrangement) != len(layer_types) - shared:
        return  # not one cache for each layer, so what a cache says of a layer is not known
    for layer, (name, kind) in enumerate(zip(layer_types, arrangement, strict=False)):
        if not isinstance(kind, AttentionKind):
            continue
        window, key = _window(config, name)
        found = kind.sliding_window
        shortest = min(window or max_model_len, found or max_model_len)
        if window != found and shortest < max_model_len:
            built = f"a window of {found}" if found else "full attention"
            said = f"{key} is {window}" if window else "it attends to all tokens"
            yield (
                f"{name}: {said}, but the model has {built}; the two are the same with "
                f"--max-model-len {shortest}",
                layer,
            )


def _window(config: Mapping[str, Any], layer_type: str) -> tuple[int | None, str]:
    """Tokens that a layer of a type attends to, None for all; and the key that says so."""
    keys = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    key = keys.get(layer_type, "")
    return config.get(key), key
