"""Why a checkpoint cannot be served, as far as vLLM's configuration of the model shows it.

This is known before any weights are read or downloaded. MLX is not imported.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_metal.model import weight_formats
from vllm_metal.model.register_models import served_model_types, unknown_model_type

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def of(model: "ModelConfig") -> Iterator[str]:
    """One line for each reason, naming what is served."""
    model_type, known = model.hf_config.model_type, served_model_types()
    if model_type not in known and not hasattr(model.hf_config, "model_file"):
        yield unknown_model_type(model_type, model.architectures)
    if model.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if callable(model.hf_overrides):
        yield "--hf-overrides as a function is not supported (allowed: a dictionary)"
    if reason := weight_formats.refusal(_weight_settings(model)):
        yield reason


def _weight_settings(model: "ModelConfig") -> dict[str, Any]:
    """What `config.json` says about the format of the weights, as vLLM has read it."""
    return {
        "model_type": model.hf_config.model_type,
        "text_config": {"model_type": model.hf_text_config.model_type},
        "quantization": getattr(model.hf_config, "quantization", None),
        "quantization_config": model.model_arch_config.quantization_config,
    }
