"""The vLLM platform: device facts, refusals and defaults.

Runs in every process that vLLM starts, so MLX is not imported here.
"""

import json
import multiprocessing
import platform as host
import random
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_metal import config
from vllm_metal.errors import UserError
from vllm_metal.machine import cache_folder, device, engine_process, torch_accelerator
from vllm_metal.machine.blas import load_fast_blas
from vllm_metal.model import checkpoint_refusals
from vllm_metal.options import (
    check,
    kv_store,
    scheduler_class,
    speculation,
    state_caching,
    structured_outputs,
)

if TYPE_CHECKING:
    import mlx.nn as nn
    from vllm.config import ModelConfig, VllmConfig
    from vllm.inputs import EngineInput
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = init_logger("vllm.metal.platform")


class MetalPlatform(Platform):
    """MLX underneath vLLM's V1 engine: Metal on a Mac, else MLX's CUDA or CPU backend."""

    _enum = PlatformEnum.OOT
    device_name = "metal"
    device_type = "cpu"
    """torch's device: vLLM samples with torch on the CPU, MLX owns the accelerator."""
    dispatch_key = "CPU"
    simple_compile_backend = "eager"
    additional_env_vars = [device.DEVICE_VARIABLE, cache_folder.STARTUP_CACHE_VARIABLE]
    supported_quantization: list[str] = []

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return host.processor() or host.machine()

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return device.machine_memory()

    @classmethod
    def import_kernels(cls) -> None:
        """Does nothing: vLLM's own C kernels are not used."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def inference_mode(cls):
        return torch.inference_mode()

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        """Tells vLLM which models there are, and that it need not know the format of their weights.

        vLLM calls it before it reads a model's configuration.
        """
        from vllm_metal.model import quantization_config  # noqa: F401, registers a class
        from vllm_metal.model.register_models import register_models

        register_models()

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Refuses `--quantization`. vLLM calls it with what that or the checkpoint says.

        Raises:
            UserError: the weights would have to be quantised while they are loaded.
        """
        from vllm_metal.model.quantization_config import NAME

        if quant != NAME:
            raise UserError(
                f"--quantization {quant} is not supported: weights are served as the checkpoint "
                "has them (mlx_lm.convert quantises them)"
            )

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Does nothing: torch stays on the CPU."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def validate_environ(cls, hard_fail: bool) -> None:
        from vllm import envs

        known = envs.environment_variables
        known.setdefault(device.DEVICE_VARIABLE, device.requested_device)
        known.setdefault(cache_folder.STARTUP_CACHE_VARIABLE, cache_folder.startup_cache)
        super().validate_environ(hard_fail)

    @classmethod
    def validate_request(
        cls, processed_inputs: "EngineInput", params: "SamplingParams | PoolingParams"
    ) -> None:
        """Refuses structured outputs that vLLM accepts and that are a mistake.

        Raises:
            VLLMValidationError: the reason, which vLLM's server gives with HTTP 400.
        """
        constraint = getattr(params, "structured_outputs", None)
        if constraint is not None:
            structured_outputs.check(constraint)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Does nothing: the block size is vLLM's default or the user's."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuses what cannot be served, then sets what this platform needs.

        vLLM calls it in the main process and again in the engine process.

        Raises:
            UserError: the configuration cannot be served; the message gives every reason, but
                those that only the model's structure shows once there is no other.
        """
        device.requested_device()
        cache_folder.startup_cache()
        _clear_layers_that_a_preset_skips(vllm_config)
        idle = check.without_effect(vllm_config)
        check.remove_idle_keys(vllm_config)
        if reasons := unsupported(vllm_config):
            raise UserError("This configuration cannot be served", reasons)
        if vllm_config.use_v2_model_runner:
            raise UserError(
                "vLLM's Model Runner V2 is not supported (VLLM_USE_V2_MODEL_RUNNER must be 0)"
            )
        in_main_process = multiprocessing.parent_process() is None
        if in_main_process and idle:
            logger.warning("No effect on this platform: %s", ", ".join(idle))
        has_state = engine_process.ask(partial(_check_structure, vllm_config, in_main_process))
        from vllm.config import CompilationMode, CUDAGraphMode

        vllm_config.parallel_config.worker_cls = "vllm_metal.worker.MetalWorker"
        scheduler_class.set_scheduler_class(vllm_config)
        vllm_config.parallel_config.disable_custom_all_reduce = True
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        torch_accelerator.disable_cache_release()
        kv_store.set_connector(vllm_config, has_state)
        if has_state:
            speculation.require_attention_alone(vllm_config)
        state_caching.set_state_caching(vllm_config, has_state)


def unsupported(vllm_config: "VllmConfig") -> list[str]:
    """Why this configuration cannot be served: one line each, naming the flag and the remedy."""
    reasons: list[str] = []
    turboquant = None
    try:
        turboquant = config.parse(
            vllm_config.additional_config, vllm_config.cache_config.cache_dtype
        )
    except UserError as error:
        reasons += error.reasons
    for part in (check, kv_store, speculation):
        reasons += part.refusals(vllm_config)
    blocks = vllm_config.cache_config.num_gpu_blocks_override
    if blocks is not None and blocks < 2:
        reasons.append(
            f"--num-gpu-blocks-override {blocks} is not supported: vLLM keeps one block, and a "
            "request needs others (allowed: 2 or more)"
        )
    return reasons + _unsupported_model(vllm_config, compresses=turboquant is not None)


def _unsupported_model(vllm_config: "VllmConfig", compresses: bool) -> list[str]:
    model = vllm_config.model_config
    if model is None:
        return []
    reasons = list(checkpoint_refusals.of(model))
    if (
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        and model.attention_chunk_size is None  # else vLLM has disabled it by itself
    ):
        reasons.append(
            "--disable-hybrid-kv-cache-manager is not supported: layers of different kinds have "
            "their own groups of pages"
        )
    if model.skip_tokenizer_init and compresses:
        reasons.append(
            "--skip-tokenizer-init is not supported with TurboQuant, which needs the tokenizer to "
            "calibrate its keys on a text"
        )
    return reasons


def _clear_layers_that_a_preset_skips(vllm_config: "VllmConfig") -> None:
    """Takes back what vLLM adds to `--kv-cache-dtype-skip-layers` for a preset of TurboQuant.

    Its own TurboQuant keeps the first and the last two layers dense. Here a preset is a name for
    a pair of formats, and the layers that stay dense are the user's choice.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model is None or cache.cache_dtype not in config.VLLM_PRESETS:
        return
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    added = TurboQuantConfig.get_boundary_skip_layers(model)
    if added and set(cache.kv_cache_dtype_skip_layers) == set(added):
        cache.kv_cache_dtype_skip_layers = []
        logger.info(
            "--kv-cache-dtype %s compresses all layers; "
            '--additional-config \'{"skip_layers": {"boundary": 2}}\' keeps the first and the last '
            "two dense, as vLLM does elsewhere",
            cache.cache_dtype,
        )


def _check_structure(vllm_config: "VllmConfig", checks_compression: bool) -> bool:
    """What the model's structure says, before its weights are read.

    Args:
        checks_compression: whether to find out if TurboQuant can compress the model.

    Returns:
        Whether the model has recurrent state. vLLM knows which of its own models do, but not which
        of mlx-lm's. Asked for prefix caching and speculation, and False where both are off.

    Raises:
        UserError: TurboQuant cannot compress the model; the worker would raise the same.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model is None:
        return False
    compresses = config.parse(vllm_config.additional_config, cache.cache_dtype) is not None
    if compresses and checks_compression:
        _check_compression(vllm_config)
    if not cache.enable_prefix_caching and vllm_config.speculative_config is None:
        return False
    structure = _structure(model)
    from vllm_metal.model.layer_kinds import has_recurrent_state

    return has_recurrent_state(structure)


def _check_compression(vllm_config: "VllmConfig") -> None:
    structure = _structure(vllm_config.model_config)
    from vllm_metal.metal_kernel_backend.selection import neutral_constants
    from vllm_metal.model.model_binding import ModelBinding
    from vllm_metal.model_pages import ModelPages

    binding = ModelBinding(structure)
    ModelPages.of(vllm_config, binding.layers, binding.states, neutral_constants(binding.layers))


def _structure(model: "ModelConfig") -> "nn.Module":
    """The model without its weights."""
    load_fast_blas()  # before MLX is first imported
    from vllm_metal.model.model_loader import ModelSource

    return _structure_of(json.dumps(asdict(ModelSource.of(model))))


@cache
def _structure_of(source: str) -> "nn.Module":
    """Built once for the same source, as JSON: vLLM checks a configuration several times."""
    from vllm_metal.model.model_loader import ModelSource, load_structure

    return load_structure(ModelSource(**json.loads(source)))
