"""What vLLM is told about quantised weights: that mlx-lm reads them.

vLLM chooses kernels of its own by the `quantization_config` of a checkpoint, and refuses what it
has none for. Here it runs no kernel of a layer. This class answers for every checkpoint in place
of vLLM's own; what is served is decided by `weight_formats`.
"""

from typing import Any, cast

import torch
from vllm.model_executor.layers.quantization import (
    QuantizationMethods,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

NAME = cast(QuantizationMethods, "mlx")  # the type lists the names of vLLM's own methods alone
"""vLLM's name for whatever mlx-lm reads."""


@register_quantization_config(NAME)
class MlxQuantizationConfig(QuantizationConfig):
    """vLLM asks it before its own methods, because it is registered from outside."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> QuantizationMethods | None:
        """Takes every checkpoint that names a method, unless `--quantization` names another."""
        method = hf_quant_cfg.get("quant_method")
        return NAME if method and user_quant in (None, NAME, method) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MlxQuantizationConfig":
        return cls()

    def get_name(self) -> QuantizationMethods:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        """No layer of vLLM's is built."""
