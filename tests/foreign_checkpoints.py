"""Tiny checkpoints with weights in the formats of others, each beside one of the same numbers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_architectures
import torch
from mlx.utils import tree_flatten

from tests import transformers_checkpoints
from tests.tiny_models import save_checkpoint
from tests.transformers_form import earlier_config
from tests.weight_files import Weights, converted, is_projection, read_weights, write_weights


def is_expert(name: str) -> bool:
    """One weight of one expert."""
    return ".experts." in name and name.endswith(".weight")


def is_whole_expert(name: str) -> bool:
    """The weights of all experts in one tensor."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


@dataclass(frozen=True)
class Case:
    """A checkpoint with weights in a format."""

    format: str
    model: str
    """The architecture of the float checkpoint."""
    convert: Callable
    quantization: dict[str, Any]
    chosen: Callable[[str], bool] = is_projection
    label: str = ""
    model_type: str = ""
    """Written into the file in place of the architecture's."""
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(filter(None, [self.format, self.model_type or self.model, self.label]))


def save_float(folder: Path, case: Case) -> Path:
    """Saves the float checkpoint of a case, under the names of the original; returns the folder."""
    if case.model == "llama":
        return save_checkpoint(folder, case.model)
    if case.model in _NAMES:
        return _save_with_experts(folder, case.model)
    return transformers_checkpoints.save(folder, case.model, **case.changes)


def checkpoints(case: Case, source: Path, folder: Path) -> tuple[Path, Path]:
    """(the case's checkpoint, one of the same numbers in float32)."""
    stored, exact = converted(read_weights(source), case.convert, case.chosen)
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = case.model_type or config["model_type"]
    if case.format == "awq":  # mlx-lm holds all other weights in the type of the scales
        exact = {name: tensor.half().float() for name, tensor in exact.items()}
    if case.model_type == "kimi_k25":
        config = {"model_type": "kimi_k25", "text_config": config | {"model_type": "kimi_k2"}}
        stored, exact = (
            {f"language_model.{name}": tensor for name, tensor in weights.items()}
            for weights in (stored, exact)
        )
    if case.model == "gpt_oss":
        exact = _gpt_oss_of_mlx(exact)
    made = folder / "format", folder / "float32"
    for path, weights in zip(made, (stored, exact), strict=True):
        shutil.copytree(source, path)
        write_weights(path, weights)
        (path / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = case.quantization
    (made[0] / "config.json").write_text(json.dumps(config))
    return made


def _save_with_experts(folder: Path, name: str) -> Path:
    """mlx-lm's random weights with the experts under the names of the original checkpoint.

    transformers has no model of Kimi K3 and Muse Spark, and writes gpt-oss in another way.
    """
    config = earlier_config(name)
    weights: Weights = {}
    for key, array in tree_flatten(tiny_architectures.tiny_model(name).parameters()):
        weights |= _NAMES[name](key, torch.from_numpy(np.array(array)))
    for key in [key for key in weights if key.endswith(("experts.gate_proj", "gate_proj_bias"))]:
        parts = weights.pop(key), weights.pop(key.replace("gate_proj", "up_proj"))
        if name == "gpt_oss":  # rows of the two take turns
            joined = torch.stack(parts, 2).flatten(1, 2)
        else:
            joined = torch.cat(parts, 1)
        weights[key.replace("gate_proj", "gate_up_proj")] = joined
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights)
    return folder


def _kimi_k3_names(name: str, tensor: torch.Tensor) -> Weights:
    base, found, projection = name.partition(".mlp.switch_mlp.")
    if not found:
        return {name: tensor}
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    projection = names[projection.removesuffix(".weight")]
    prefix = f"{base}.block_sparse_moe.experts"
    return {f"{prefix}.{i}.{projection}.weight": expert for i, expert in enumerate(tensor)}


def _gpt_oss_names(name: str, tensor: torch.Tensor) -> Weights:
    if ".experts." not in name:
        return {name: tensor}
    return {name.removesuffix(".weight").replace(".bias", "_bias"): tensor}


def _muse_spark_names(name: str, tensor: torch.Tensor) -> Weights:
    """Gates and norms of the original have other values than mlx-lm's; any will do."""
    if name.endswith("_beta"):
        return {}
    for mine, original in (
        ("add_attn_alpha", "post_attention_residual_gate.gate"),
        ("add_ffn_alpha", "post_feedforward_residual_gate.gate"),
    ):
        if name.endswith(mine):
            return {name.replace(mine, original): tensor}
    if name.endswith("qkvg_proj.weight"):
        q, k, v, gate = tensor.split([128, 64, 64, 128])
        parts = {"q_proj": q, "k_proj": k, "v_proj": v, "gate_proj": gate}
        return {name.replace("qkvg_proj", key): part for key, part in parts.items()}
    if name.endswith("_proj.weight") and ".experts." in name:
        return {name.removesuffix(".weight"): tensor}
    return {name: tensor}


_NAMES = {
    "gpt_oss": _gpt_oss_names,
    "kimi_k3": _kimi_k3_names,
    "muse_spark": _muse_spark_names,
}
"""What gives a tensor of mlx-lm's model its names in the original checkpoint."""


def _gpt_oss_of_mlx(weights: Weights) -> Weights:
    """Under mlx-lm's names, which it reads float weights of."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        if ".experts." not in name:
            renamed[name] = tensor
            continue
        base, _, part = name.rpartition(".")
        projection, suffix = part.removesuffix("_bias"), "bias" if "bias" in part else "weight"
        if projection == "down_proj":
            renamed[f"{base}.down_proj.{suffix}"] = tensor
            continue
        gate, up = tensor.unflatten(1, (-1, 2)).unbind(2)
        renamed |= {f"{base}.gate_proj.{suffix}": gate, f"{base}.up_proj.{suffix}": up}
    return renamed
