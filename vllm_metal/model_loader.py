"""Loads the model with mlx-lm; knows nothing of attention."""

from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model

from vllm_metal.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_WEIGHT_FILES = ["*.json", "*.safetensors", "*.py"]


def mlx_dtype(name: object) -> mx.Dtype:
    """The MLX type of a torch type or its name, e.g. `torch.bfloat16` or `bfloat16`."""
    return getattr(mx, str(name).removeprefix("torch."))


def load_model(model_config: "ModelConfig") -> nn.Module:
    """The model in evaluation mode, its floating-point weights in `model_config.dtype`.

    Raises:
        UserError: the folder holds no model that mlx-lm can load.
    """
    path = Path(model_config.model)
    if not path.is_dir():
        path = Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                allow_patterns=_WEIGHT_FILES,
            )
        )
    try:
        model, _ = mlx_lm_load_model(
            path, lazy=True, trust_remote_code=model_config.trust_remote_code
        )
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise UserError(f"mlx-lm cannot load {model_config.model!r}", [str(error)]) from error
    model.set_dtype(mlx_dtype(model_config.dtype))
    model.eval()
    mx.eval(model.parameters())
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
