"""Loads a model with mlx-lm, and its tokenizer; knows nothing of attention or of vLLM."""

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_map_with_path, tree_reduce
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.utils import _get_classes, can_run_metal
from mlx_lm.utils import load_model as mlx_lm_load_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_metal.errors import UserError
from vllm_metal.model import weight_formats
from vllm_metal.model.checkpoint_config import CheckpointConfig, read_config
from vllm_metal.model.config_check import check_built_model

_CONFIG_FILES = ["*.json", "*.py"]
_WEIGHT_FILES = [*_CONFIG_FILES, "*.safetensors"]
_TOKENIZER_FILES = [*_CONFIG_FILES, "*.model", "*.tiktoken", "*.txt", "*.jinja"]

_LOAD_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SystemExit,
    TypeError,
    ValueError,
)
"""What mlx-lm raises for a checkpoint that it does not understand, or whose code needs a package
that is missing."""


def mlx_dtype(name: object) -> mx.Dtype:
    """The MLX type of a torch type or its name, e.g. `torch.bfloat16` or `bfloat16`."""
    return getattr(mx, str(name).removeprefix("torch."))


@dataclass(frozen=True)
class ModelSource:
    """Where a model and its settings come from."""

    model: str
    """A local folder, or a name on the Hugging Face Hub."""
    revision: str | None = None
    """Of the model on the Hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    hf_config_path: str | None = None
    """Where `config.json` is, if it is not with the model."""
    hf_config_revision: str | None = None
    """Of that place on the Hub."""
    hf_overrides: Mapping[str, Any] | None = None
    """Settings that replace those of `config.json`."""

    @classmethod
    def of(cls, model_config: Any) -> "ModelSource":
        """What vLLM's `ModelConfig` names."""
        return cls(
            model_config.model,
            model_config.revision,
            model_config.trust_remote_code,
            model_config.hf_config_path,
            model_config._hf_config_revision,
            model_config.hf_overrides,
        )

    def config(self) -> CheckpointConfig:
        """The settings that the model is built from.

        Raises:
            UserError: there is no `config.json`, or it cannot be read.
        """
        return read_config(self.config_folder(), self.hf_overrides)

    def config_folder(self) -> Path:
        """The folder of the `config.json` that counts, which may lie elsewhere than the weights.

        Raises:
            UserError: it is no local folder and could not be downloaded.
        """
        place = self.model, self.revision
        if self.hf_config_path:
            place = self.hf_config_path, self.hf_config_revision
        return _local_folder(*place, _CONFIG_FILES)


def load_model(
    source: ModelSource, dtype: object, *, max_model_len: int | None = None
) -> nn.Module:
    """The model in evaluation mode, computing in `dtype`, a torch type or its name.

    Quantised weights stay quantised; their scales take the type, since activations follow them.

    Args:
        source: where the model is.
        dtype: a torch type or its name.
        max_model_len: tokens of the longest request, to which sliding windows are compared.

    Raises:
        UserError: the folder holds no model that mlx-lm can load, or mlx-lm would compute
            something else than its `config.json` says.
    """
    path = model_folder(source.model, source.revision)
    config = replace(source, model=str(path)).config()
    weight_formats.check(config.for_mlx_lm, path)
    loaded = _load(path, config, source.trust_remote_code, strict=True)
    check_built_model(loaded, config.written, max_model_len)
    _check_weights(loaded, path)
    _cast(loaded, mlx_dtype(dtype))
    loaded.eval()
    mx.eval(loaded.parameters())
    return loaded


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder that `load_model` reads, on this machine.

    Raises:
        UserError: the model is no local folder and could not be downloaded.
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


def load_structure(source: ModelSource) -> nn.Module:
    """The model with its shapes and without its weights, from the config file alone.

    Nothing is evaluated, so it takes no memory.

    Raises:
        UserError: there is no config file, or mlx-lm does not know the model.
    """
    path = source.config_folder()
    return _load(
        path, read_config(path, source.hf_overrides), source.trust_remote_code, strict=False
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Converts floating-point parameters to `dtype`.

    Those that the model itself excepts keep their type, such as the biases that choose experts,
    and so does the float32 scale of a whole tensor in NVFP4.
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
            f"{model!r} is not a local folder and could not be downloaded "
            "from the Hugging Face Hub",
            [_first_line(error)],
        ) from error


def _load(path: Path, config: CheckpointConfig, trust_remote_code: bool, strict: bool) -> nn.Module:
    """mlx-lm's model of a configuration; the weights are read when they are first used."""
    settings = config.for_mlx_lm

    def model_classes(config: dict[str, Any]) -> tuple[type, type]:
        """mlx-lm's, and its configuration is ours: it has merged the two until now."""
        config.clear()
        config.update(copy.deepcopy(settings))  # some models change theirs
        return _get_classes(config)

    try:
        with _folder_with_config(path) as folder:
            model, _ = mlx_lm_load_model(
                folder,
                lazy=True,
                strict=strict,
                model_config=settings,
                get_model_classes=model_classes,
                trust_remote_code=trust_remote_code,
            )
    except _LOAD_ERRORS as error:
        raise UserError(f"mlx-lm cannot load {str(path)!r}", [_reason(error)]) from error
    return model


@contextlib.contextmanager
def _folder_with_config(path: Path) -> Iterator[Path]:
    """The folder, or one beside it with an empty `config.json`, which mlx-lm wants to read.

    With `--hf-config-path` the weights may lie in a folder without one.
    """
    if (path / "config.json").exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        for file in path.iterdir():
            (Path(made) / file.name).symlink_to(file.resolve())
        (Path(made) / "config.json").write_text("{}")
        yield Path(made)


def _check_weights(model: nn.Module, path: Path) -> None:
    """Refuses weights that mlx-lm cannot compute with.

    These are codes of a format that mlx-lm took for numbers, which are integers without scales, and
    ternary weights on another device than Metal.
    """
    for name, module in model.named_modules():
        if isinstance(module, BitLinear) and not can_run_metal():
            raise UserError(
                f"mlx-lm cannot run {str(path)!r} on this device",
                [f"{name} has ternary weights (bitnet), which mlx-lm multiplies on Metal alone"],
            )
        weight = module.get("weight")
        if not isinstance(weight, mx.array) or mx.issubdtype(weight.dtype, mx.floating):
            continue
        if "scales" not in module and "weight_scale" not in module:
            raise UserError(
                f"mlx-lm cannot load {str(path)!r}",
                [f"{name}.weight has the type {weight.dtype} and no scales"],
            )


def _reason(error: BaseException) -> str:
    """Why mlx-lm could not load a model, naming the key of `config.json` that it misses."""
    if isinstance(error, SystemExit):
        missing_package = getattr(error.__context__, "name", None)
        return f"its code needs the package {missing_package}, which is not installed"
    missing = re.search(r"missing \d+ required positional arguments?: (.*)", str(error))
    if isinstance(error, TypeError) and missing:
        return f"config.json lacks {missing[1]}"
    if isinstance(error, KeyError):
        return f"config.json or the weights lack {error}"
    return str(error) or type(error).__name__


def _first_line(error: Exception) -> str:
    """The first line of the error's message; the kind of error where it has no message."""
    return str(error).partition("\n")[0] or type(error).__name__
