"""Lets vLLM accept models that mlx-lm knows and transformers or vLLM does not.

vLLM reads a model's `config.json` through transformers and wants the architecture in its own
registry, though it never builds the model here. Model types and architectures that they lack are
registered. Multi-modal architectures are replaced by a text model: mlx-lm runs the language model
alone, and vLLM would import the vision part to inspect it, which needs packages such as
torchvision. An architecture that nobody knows is taken for a text model, too, since mlx-lm chooses
its model by `model_type`; without a model of that type, this package's own refusal names both.
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_metal.errors import ChangedLibraryError, UserError

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
        text = settings.get("text_config")
        if isinstance(text, dict):  # vLLM asks the language model's settings for the names above
            self.text_config = _config_class(text.get("model_type", self.model_type))(**text)
        register_architectures(self.architectures or [])
        if "AutoConfig" in (settings.get("auto_map") or {}):
            require_that_code_of_checkpoints_comes_first()

    def __reduce__(self):
        return _restore, (self.model_type, self.__dict__)


def register_models() -> None:
    """Does all that follows, before vLLM reads a model's configuration.

    Raises:
        ChangedLibraryError: what is replaced or read in vLLM or mlx-lm has changed.
    """
    register_model_types()
    register_text_models()
    take_unknown_architectures()
    refuse_unknown_model_types()


def register_model_types() -> list[str]:
    """Registers the model types that transformers and vLLM do not know, and returns them."""
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


def register_architectures(architectures: Iterable[str]) -> None:
    """Registers the names that vLLM's registry lacks."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in set(architectures) - set(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(architecture, _STAND_IN)


def take_unknown_architectures() -> None:
    """Makes vLLM take an architecture that it lacks, or that it cannot import, for a text model.

    Raises:
        ChangedLibraryError: vLLM refuses such architectures in another place.
    """
    from vllm.model_executor.models import ModelRegistry

    # patch: what vLLM's registry does with architectures that it cannot inspect
    registry, name = type(ModelRegistry), "_raise_for_unsupported"
    if not callable(getattr(registry, name, None)):
        where = f"{registry.__module__}.{registry.__name__}.{name}"
        raise ChangedLibraryError("vllm", where, "it does not exist")
    setattr(registry, name, _inspect_stand_in)


def _inspect_stand_in(registry: Any, architectures: list[str]) -> tuple[Any, str]:
    """What vLLM's registry gives for the first architecture, as for one that it knows."""
    registry.register_model(architectures[0], _STAND_IN)
    return registry._try_inspect_model_cls(architectures[0]), architectures[0]


def refuse_unknown_model_types() -> None:
    """Makes a `model_type` that nobody knows a refusal that names it and the architecture.

    transformers would advise to install another version of itself. A second call does nothing.

    Raises:
        ChangedLibraryError: vLLM reads `config.json` in another place.
    """
    module = importlib.import_module("vllm.transformers_utils.config")
    # patch: what vLLM says of a `config.json` that transformers cannot read
    parser = getattr(module, "HFConfigParser", None)
    parse = getattr(parser, "parse", None)
    if parser is None or parse is None:
        where = f"{module.__name__}.HFConfigParser.parse"
        raise ChangedLibraryError("vllm", where, "it does not exist")
    if getattr(parse, "refuses_unknown_types", False):
        return

    def parse_or_refuse(self: Any, model: str | Path, *args: Any, **kwargs: Any) -> Any:
        try:
            return parse(self, model, *args, **kwargs)
        except ValueError as error:
            settings, _ = PretrainedConfig.get_config_dict(model, revision=kwargs.get("revision"))
            model_type, known = settings.get("model_type"), served_model_types()
            if not model_type or model_type in known:
                raise
            reason = unknown_model_type(model_type, settings.get("architectures") or [])
            raise UserError("This configuration cannot be served", [reason]) from error

    parse_or_refuse.refuses_unknown_types = True  # type: ignore[attr-defined]
    parser.parse = parse_or_refuse


def unknown_model_type(model_type: str, architectures: Iterable[str]) -> str:
    """Why a model is refused for which mlx-lm has no code."""
    named = f"architecture {', '.join(architectures)}: " if architectures else ""
    known = ", ".join(sorted(served_model_types(), key=str.lower))
    return f"{named}mlx-lm has no model of the type {model_type} (it has: {known})"


def register_text_models() -> None:
    """Makes vLLM take every multi-modal architecture for a text model.

    Architectures that transformers knows and vLLM does not are registered too, so that a model
    without a counterpart in mlx-lm is refused in this package's own words.

    Raises:
        ChangedLibraryError: vLLM has no table of multi-modal architectures any more.
    """
    from vllm.model_executor.models import ModelRegistry

    for architecture in _vllm_table("vllm.model_executor.models.registry", "_MULTIMODAL_MODELS"):
        ModelRegistry.register_model(architecture, _STAND_IN)
    register_architectures(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@cache
def mlx_lm_model_types() -> frozenset[str]:
    """Names of mlx-lm's model files; MLX is not imported."""
    files = (file for folder in _mlx_lm_folders() for file in (folder / "models").glob("*.py"))
    return frozenset(file.stem for file in files if b"\nclass Model(" in file.read_bytes())


@cache
def served_model_types() -> frozenset[str]:
    """Values of `model_type` for which mlx-lm has a model; MLX is not imported.

    These are the names of its model files, and those that it maps to them.

    Raises:
        ChangedLibraryError: mlx-lm has no table of such names any more.
    """
    table = "MODEL_REMAPPING"
    for folder in _mlx_lm_folders():
        for node in ast.parse((folder / "utils.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table:
                return mlx_lm_model_types() | set(ast.literal_eval(node.value))
    raise ChangedLibraryError("mlx-lm", f"mlx_lm.utils.{table}", "it does not exist")


def _mlx_lm_folders() -> list[Path]:
    package = importlib.util.find_spec("mlx_lm")
    return [Path(f) for f in (package.submodule_search_locations or [])] if package else []


def _vllm_types() -> set[str]:
    """The model types for which vLLM has a configuration class of its own."""
    return set(_vllm_table("vllm.transformers_utils.config", "_CONFIG_REGISTRY"))


def _vllm_table(module: str, name: str) -> Mapping[str, Any]:
    # patch: private tables of vLLM's, which are only read
    table = getattr(importlib.import_module(module), name, None)
    if not isinstance(table, Mapping) or not table:
        raise ChangedLibraryError("vllm", f"{module}.{name}", f"it is no mapping but {table!r}")
    return table


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
