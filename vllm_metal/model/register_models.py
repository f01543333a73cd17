"""Lets vLLM accept models that mlx-lm knows and transformers or vLLM does not.

vLLM reads a model's `config.json` through transformers and wants the architecture in its own
registry, though it never builds the model here. What either lacks is registered, nothing that
they know is replaced.
"""

import importlib.util
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_metal.errors import ChangedLibraryError

_NAMES = {
    "hidden_size": ("hidden_dim", "model_dim", "n_embd", "dim"),
    "num_hidden_layers": ("num_layers", "num_transformer_layers", "n_layer", "n_layers"),
    "num_attention_heads": ("num_heads", "num_query_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": ("max_context_length", "n_positions", "max_seq_len"),
}
"""The settings that vLLM asks for, and the other names under which models have them."""

_STAND_IN = "vllm.model_executor.models.llama:LlamaForCausalLM"
"""The class named for an architecture that vLLM will never build."""


class MlxLmConfig(PretrainedConfig):
    """The settings of a `config.json`, under vLLM's names too.

    Where a model has another number in each layer, vLLM gets the largest; the layers' own numbers
    are read from the model.
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
        if "AutoConfig" in (settings.get("auto_map") or {}):
            require_that_code_of_checkpoints_comes_first()

    def __reduce__(self):
        return _restore, (self.model_type, self.__dict__)


def register_model_types() -> list[str]:
    """Registers the model types that are unknown; gives their names. Cheap when done again."""
    known = set(CONFIG_MAPPING.keys()) | _vllm_types()
    unknown = sorted(mlx_lm_model_types() - known)
    for model_type in unknown:
        AutoConfig.register(model_type, _config_class(model_type))
    return unknown


@cache
def require_that_code_of_checkpoints_comes_first() -> None:
    """Called for a checkpoint with code of its own: there the claim of `_config_class` matters.

    Raises:
        ChangedLibraryError: transformers does not look at the module of a class any more.
    """
    if ".__module__.startswith(" not in inspect.getsource(AutoConfig.from_pretrained):
        raise ChangedLibraryError(
            "transformers",
            "transformers.AutoConfig.from_pretrained",
            "it does not compare `__module__` of a registered class, so that the code of a "
            "checkpoint may never be used",
        )


def register_architectures(architectures: list[str]) -> None:
    """Registers the names that vLLM's registry lacks."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in set(architectures) - set(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(architecture, _STAND_IN)


@cache
def mlx_lm_model_types() -> frozenset[str]:
    """Names of mlx-lm's model files; MLX is not imported."""
    package = importlib.util.find_spec("mlx_lm")
    folders = (package.submodule_search_locations or []) if package else []
    files = (file for folder in folders for file in Path(folder, "models").glob("*.py"))
    return frozenset(file.stem for file in files if b"\nclass Model(" in file.read_bytes())


def _vllm_types() -> set[str]:
    """The model types for which vLLM has a configuration class of its own."""
    # patch: a private list of vLLM's, which is only read
    from vllm.transformers_utils import config

    registry = getattr(config, "_CONFIG_REGISTRY", None)
    if not isinstance(registry, Mapping):
        name = "vllm.transformers_utils.config._CONFIG_REGISTRY"
        raise ChangedLibraryError("vllm", name, f"it is no mapping but {registry!r}")
    return set(registry)


@cache
def _config_class(model_type: str) -> type[MlxLmConfig]:
    """A class of the settings of one model type.

    It claims to be a class of transformers. Where a checkpoint comes with code of its own that the
    user trusts, transformers prefers that code to a class of its own package, but not to one that
    somebody registered, and the class's `__module__` is how it tells the two.
    """
    # patch: the module that the class claims to come from
    of_transformers = {"__module__": "transformers.models", "model_type": model_type}
    return type("MlxLmConfig", (MlxLmConfig,), of_transformers)


def _restore(model_type: str, settings: dict[str, Any]) -> MlxLmConfig:
    """The reverse of pickling, in a process that may have registered nothing yet."""
    register_model_types()
    config = _config_class(model_type).__new__(_config_class(model_type))
    config.__dict__.update(settings)
    register_architectures(config.architectures or [])
    return config
