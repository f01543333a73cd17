"""Tiny random models of mlx-lm's architectures, and checkpoints of them."""

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tests.tiny_configs import (
    FETCHED,
    LAYERS,
    MIXED,
    ONE_AT_A_TIME,
    PLAIN,
    RECURRENT,
    SERVED,
    SHARED,
    VOCABULARY,
    WINDOWED,
)

__all__ = [
    "FETCHED",
    "LAYERS",
    "MIXED",
    "ONE_AT_A_TIME",
    "RECURRENT",
    "SERVED",
    "SHARED",
    "VOCABULARY",
    "WINDOWED",
]

_ALL = SERVED | ONE_AT_A_TIME | FETCHED | SHARED | WINDOWED | RECURRENT | MIXED


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a tiny model; its name is its type where it says no other."""
    return {"model_type": name, "torch_dtype": "float32", **PLAIN, **_ALL[name]} | changes


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """mlx-lm's model of this name with random float32 weights, large enough to matter."""
    mx.random.seed(seed)
    config = config_of(name, **changes)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    key = mx.random.key(seed)

    def random(path: str, array: mx.array) -> mx.array:
        nonlocal key
        key, sub = mx.random.split(key)
        noise = mx.random.normal(array.shape, key=sub)
        if array.ndim < 2:
            return array + 0.1 * noise
        return noise * array.shape[-1] ** -0.5

    model.update(tree_map_with_path(random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def save_checkpoint(
    folder: Path,
    name: str = "llama",
    seed: int = 0,
    quantization: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Writes config and weights as a Hugging Face folder without a tokenizer; returns it.

    With `quantization` (`group_size`, `bits`, `mode`), as mlx-lm writes a quantised model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name, **changes)
    model = tiny_model(name, seed, **changes)
    if quantization:
        nn.quantize(model, **quantization)
        config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer that reads characters: one for each token of the vocabulary."""
    characters = {chr(32 + i): i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
