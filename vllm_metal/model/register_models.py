"""Lets vLLM accept models that mlx-lm knows and transformers or vLLM does not.

vLLM reads a model's `config.json` through transformers and wants the architecture in its own
registry, though it never builds the model here. Model types and architectures that they lack are
registered. Multi-modal architectures are replaced by a text model: mlx-lm runs the language model
alone, and vLLM would import the vision part to inspect it, which needs packages such as
torchvision.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_NAMES = {
    "hidden_size": ("hidden_dim", "model_dim", "n_embd", "dim"),
    "num_hidden_layers": ("num_layers", "num_transformer_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_heads", "num_query_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": ("max_context_length", "n_positions", "max_seq_len"),
}
"""vLLM's names of settings, and the names that models have for the same."""

_STAND_IN = "vllm.model_executor.models.llama:LlamaForCausalLM"
"""The model that vLLM's registry names for an architecture that vLLM does not build."""


class MlxLmConfig(PretrainedConfig):
    """The settings of a `config.json`, also under vLLM's names.

    If the layers of a model differ in a number, vLLM is told the largest. The number of each layer
    is read off the model that mlx-lm builds.
    """

    def __post_init__(self, **settings: Any):
        super().__post_init__(**settings)
        for name, others in _NAMES.items():
            for other in others:
                given = settings.get(other)
                if isinstance(given, list):
                    given = max(given)
                    setattr(self, other, given)
                if given is not None and getattr(self, name, None) is None:
                    setattr(self, name, given)
        register_architectures(self.architectures or [])

    def __reduce__(self):
        return _restore, (self.model_type, self.__dict__)


def register_model_types() -> list[str]:
    """Registers the model types that transformers and vLLM do not know.

    Returns their names. Nothing is done a second time.
    """
    known = set(CONFIG_MAPPING.keys()) | _vllm_types()
    unknown = sorted(mlx_lm_model_types() - known)
    for model_type in unknown:
        AutoConfig.register(model_type, _config_class(model_type))
    return unknown


def register_architectures(architectures: Iterable[str]) -> None:
    """Registers the names that vLLM's registry lacks."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in set(architectures) - set(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(architecture, _STAND_IN)


def register_text_models() -> None:
    """Makes vLLM take every multi-modal architecture for a text model.

    Architectures that transformers knows and vLLM does not are registered too, so that a model
    without a counterpart in mlx-lm is refused in this package's own words.
    """
    from vllm.model_executor.models import ModelRegistry

    for architecture in _vllm_private("vllm.model_executor.models.registry", "_MULTIMODAL_MODELS"):
        ModelRegistry.register_model(architecture, _STAND_IN)
    register_architectures(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@cache
def mlx_lm_model_types() -> frozenset[str]:
    """Names of mlx-lm's model files; MLX is not imported."""
    files = _mlx_lm_folder("models").glob("*.py")
    return frozenset(file.stem for file in files if b"\nclass Model(" in file.read_bytes())


@cache
def served_model_types() -> frozenset[str]:
    """Values of `model_type` for which mlx-lm has a model; MLX is not imported.

    These are its model files and the names that it maps to them.

    Raises:
        RuntimeError: mlx-lm no longer has the table of these names.
    """
    source = (_mlx_lm_folder() / "utils.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            return mlx_lm_model_types() | set(ast.literal_eval(node.value))
    raise RuntimeError("mlx_lm.utils has no MODEL_REMAPPING; vllm_metal needs mlx-lm 0.32")


def _mlx_lm_folder(*parts: str) -> Path:
    package = importlib.util.find_spec("mlx_lm")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("mlx-lm is not installed")
    return Path(package.submodule_search_locations[0], *parts)


def _vllm_types() -> set[str]:
    return set(_vllm_private("vllm.transformers_utils.config", "_CONFIG_REGISTRY"))


def _vllm_private(module: str, name: str) -> dict[str, Any]:
    """A table of vLLM's, by name, that vLLM does not promise to keep.

    Raises:
        RuntimeError: it is not there, or is something else than in vLLM 0.32.
    """
    table = getattr(importlib.import_module(module), name, None)
    if not isinstance(table, dict) or not table or not all(isinstance(key, str) for key in table):
        raise RuntimeError(f"{module} has no table {name}; vllm_metal needs vLLM 0.32")
    return table


@cache
def _config_class(model_type: str) -> type[MlxLmConfig]:
    """The class of one model type.

    transformers prefers the code that comes with a checkpoint, if the user trusts it, to a class of
    its own package, but not to a class registered from outside. So the class says that it belongs
    to transformers.
    """
    of_transformers = {"__module__": "transformers.models", "model_type": model_type}
    return type("MlxLmConfig", (MlxLmConfig,), of_transformers)


def _restore(model_type: str, settings: dict[str, Any]) -> MlxLmConfig:
    """Unpickles a configuration, also in a process that has registered nothing yet."""
    register_model_types()
    config = _config_class(model_type).__new__(_config_class(model_type))
    config.__dict__.update(settings)
    register_architectures(config.architectures or [])
    return config
