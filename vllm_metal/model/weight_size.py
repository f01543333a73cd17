"""How many bytes a model's weights take, before they are loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

INDEX = "model.safetensors.index.json"
"""The index of a checkpoint of several files. mlx-lm writes it for one file, too."""

UNQUANTISED_BYTES = 2
"""Of a parameter in bfloat16 or float16, as checkpoints have them."""


@dataclass(frozen=True)
class WeightSize:
    """Bytes, and what they were taken from."""

    bytes: int
    source: str


def weight_size(folder: Path, model: nn.Module, settings: Mapping[str, Any]) -> WeightSize:
    """The size of a checkpoint of which the config file may be all that there is.

    Args:
        folder: of the checkpoint, as far as it is on this machine.
        model: its structure; its arrays are not evaluated.
        settings: of its config file, as mlx-lm reads them.
    """
    if files := sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        return WeightSize(files, "its files")
    if (index := folder / INDEX).exists():
        total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
        if total:
            return WeightSize(int(total), f"its {INDEX}")
    return WeightSize(_by_config(model, settings.get("quantization") or {}), "its config.json")


def _by_config(model: nn.Module, quantization: Mapping[str, Any]) -> int:
    """As mlx-lm would have quantised it: an entry of a layer's own counts before the model's.

    mlx-lm has quantised the layers with an entry of their own in the structure already.
    """
    total: int = tree_reduce(lambda size, array: size + _bytes(array), model.parameters(), 0)
    if "bits" not in quantization:
        return total
    predicate = getattr(model, "quant_predicate", None)
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        chosen = quantization.get(path)
        if chosen is None:
            chosen = predicate(path, module) if predicate else True
        if chosen is False:
            continue
        own = chosen if isinstance(chosen, Mapping) else {}  # a `quant_predicate` may give one
        total += _change(module.weight, {**quantization, **own})
    return total


def _bytes(array: mx.array) -> int:
    """In a checkpoint, whatever type the array has in a structure without weights."""
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.size * UNQUANTISED_BYTES if is_float else array.nbytes


def _change(weight: mx.array, quantization: Mapping[str, Any]) -> int:
    """What quantisation adds to the bytes of a weight: less than nothing."""
    group_size, bits = quantization["group_size"], quantization["bits"]
    if weight.shape[-1] % group_size:
        return 0
    is_affine = quantization.get("mode", "affine") == "affine"
    of_group = 2 * UNQUANTISED_BYTES if is_affine else 1  # scale and bias, or a scale of one byte
    quantised = weight.size * bits // 8 + weight.size // group_size * of_group
    return quantised - weight.size * UNQUANTISED_BYTES
