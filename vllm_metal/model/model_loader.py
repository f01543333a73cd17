"""Loads the model with mlx-lm, and its tokenizer; knows nothing of attention nor of vLLM."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_map_with_path, tree_reduce
from mlx_lm.utils import load_model as mlx_lm_load_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_metal.errors import UserError

_CONFIG_FILES = ["*.json", "*.py"]
_WEIGHT_FILES = [*_CONFIG_FILES, "*.safetensors"]
_TOKENIZER_FILES = [*_CONFIG_FILES, "*.model", "*.tiktoken", "*.txt", "*.jinja"]


def mlx_dtype(name: object) -> mx.Dtype:
    """The MLX type of a torch type or its name, e.g. `torch.bfloat16` or `bfloat16`."""
    return getattr(mx, str(name).removeprefix("torch."))


def load_model(
    model: str, dtype: object, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model in evaluation mode, computing in `dtype`, a torch type or its name.

    Quantised weights stay quantised; their scales take the type, since activations follow them.

    Raises:
        UserError: the folder holds no model that mlx-lm can load.
    """
    loaded = _load(model_folder(model, revision), trust_remote_code, strict=True)
    _cast(loaded, mlx_dtype(dtype))
    loaded.eval()
    mx.eval(loaded.parameters())
    return loaded


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder that `load_model` reads, on this machine.

    Raises:
        UserError: the model is neither a folder nor to be had from the Hugging Face hub.
    """
    return _local_folder(model, revision, _WEIGHT_FILES)


def load_tokenizer(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: the folder holds no tokenizer that transformers can load.
    """
    path = _local_folder(model, revision, _TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(f"transformers cannot load the tokenizer of {model!r}: {reason}") from error


def load_structure(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model with its shapes and without its weights, from the config file alone.

    Nothing is evaluated, so it takes no memory.

    Raises:
        UserError: there is no config file, or mlx-lm does not know the model.
    """
    path = _local_folder(model, revision, _CONFIG_FILES)
    if not (path / "config.json").exists():
        raise UserError(f"{model!r} holds no config.json")
    return _load(path, trust_remote_code, strict=False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0)


def weight_bytes_on_disk(model: str) -> int | None:
    """Bytes of a local folder's weight files; None where there are none."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) or None


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Floating-point parameters to `dtype`, but for those that must keep theirs.

    These are the ones that the model itself excepts, such as the biases that choose experts, and
    the float32 scale of a whole tensor in NVFP4.
    """
    may_cast = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        if not floating or path.endswith("global_scale") or not may_cast(path):
            return array
        return array.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def _local_folder(model: str, revision: str | None, patterns: list[str]) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Model {model!r} is neither a folder nor to be had from the Hugging Face hub",
            [_first_line(error)],
        ) from error


def _load(path: Path, trust_remote_code: bool, strict: bool) -> nn.Module:
    try:
        model, _ = mlx_lm_load_model(
            path, lazy=True, strict=strict, trust_remote_code=trust_remote_code
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"mlx-lm cannot load {str(path)!r}", [str(error)]) from error
    return model


def _first_line(error: Exception) -> str:
    """The first line of the error's message; the kind of error where it has no message."""
    return str(error).partition("\n")[0] or type(error).__name__
