"""The tiny random models that tests serve, by kind, and checkpoints of them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tiny_architectures import config_of, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["config_of", "tiny_model"]

VOCABULARY: int = config_of("llama")["vocab_size"]
LAYERS: int = config_of("llama")["num_hidden_layers"]

SERVED = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "phi3", "mixtral", "olmo2", "glm4", "starcoder2"),
    *("granite", "hunyuan_v1_dense", "smollm3", "cohere", "minicpm3", "openelm"),
)
"""Architectures with plain attention."""

ONE_AT_A_TIME = ("gpt_bigcode",)
"""Architectures with plain attention that take one position for all rows of a forward.

So do "afm7" of `SHARED` and "gemma2" of `FETCHED`, whose mask does not fit a batch of rows."""

WINDOWED = ("gemma3_text", "olmo3", "gpt_oss")
"""Architectures with sliding windows in some layers."""

RECURRENT = ("mamba", "qwen3_next", "jamba", "falcon_h1", "granitemoehybrid")
"""Architectures with recurrent states, all but the first with attention, too."""

FETCHED = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "mistral4", "longcat_flash", "stablelm"),
    "gemma2",
)
"""Architectures that compute on what their caches return."""

SHARED = ("gemma4_shared", "afm7")
"""Models with layers that attend over the keys and values of other layers."""


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
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
