"""The vLLM platform: device facts, refusals and defaults.

Runs in every process that vLLM starts, also in those that never load a model, so MLX is not
imported here.
"""

import json
import platform as host
import random
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_metal import config
from vllm_metal.errors import UserError
from vllm_metal.machine import device
from vllm_metal.machine.blas import load_fast_blas
from vllm_metal.model import weight_formats

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = init_logger("vllm.metal.platform")

BLOCK_SIZES = (8, 16, 32, 64, 128)
LOAD_FORMATS = ("auto", "safetensors")
"""Values of `--block-size` that are served."""


class MetalPlatform(Platform):
    """MLX underneath vLLM's V1 engine: Metal on a Mac, else MLX's CUDA or CPU backend."""

    _enum = PlatformEnum.OOT
    device_name = "metal"
    device_type = "cpu"
    """torch's device: vLLM samples with torch on the CPU, MLX owns the accelerator."""
    dispatch_key = "CPU"
    simple_compile_backend = "eager"
    additional_env_vars = [device.DEVICE_VARIABLE]
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
        """vLLM's own C kernels are not used."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def inference_mode(cls):
        return torch.inference_mode()

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        """vLLM calls it before it reads a model's configuration."""
        from vllm_metal.model import quantization_config  # noqa: F401, registers itself
        from vllm_metal.model.register_models import register_model_types, register_text_models

        register_model_types()
        register_text_models()

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """vLLM calls it with what the checkpoint has, or what `--quantization` asks for.

        Raises:
            UserError: the weights would have to be quantised while loading.
        """
        from vllm_metal.model.quantization_config import NAME

        if quant != NAME:
            raise UserError(
                f"--quantization {quant} is not supported: weights are served as the checkpoint "
                "has them (mlx_lm.convert quantises them)"
            )

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """torch stays on the CPU."""

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

        envs.environment_variables.setdefault(device.DEVICE_VARIABLE, device.requested_device)
        super().validate_environ(hard_fail)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """The block size is vLLM's default or the user's; nothing in the backend changes it."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuses what cannot be served, then sets what this platform needs.

        vLLM calls it in the main process and again in the engine process.

        Raises:
            UserError: with every reason at once.
        """
        device.requested_device()
        reasons = unsupported(vllm_config)
        if reasons:
            raise UserError("This configuration cannot be served", reasons)
        from vllm.config import CompilationMode, CUDAGraphMode

        vllm_config.parallel_config.worker_cls = "vllm_metal.worker.MetalWorker"
        vllm_config.parallel_config.disable_custom_all_reduce = True
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if vllm_config.model_config is not None:
            text_only(vllm_config.model_config)
        _leave_the_accelerator_alone()
        _cache_no_prefixes_of_states(vllm_config)


def unsupported(vllm_config: "VllmConfig") -> list[str]:
    """Why this configuration cannot be served: one line each, naming the flag and the remedy."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    reasons: list[str] = []
    turboquant = None
    try:
        turboquant = config.parse(vllm_config.additional_config, cache.cache_dtype)
    except UserError as error:
        reasons += error.reasons
    if cache.block_size not in BLOCK_SIZES:
        reasons.append(
            f"--block-size {cache.block_size} (allowed: {', '.join(map(str, BLOCK_SIZES))})"
        )
    for flag, size in (
        ("--tensor-parallel-size", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--data-parallel-size", parallel.data_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
    ):
        if size > 1:
            reasons.append(f"{flag} {size}: one process serves one device (allowed: 1)")
    for given, what in (
        (vllm_config.speculative_config, "speculative decoding (--speculative-config)"),
        (vllm_config.lora_config, "LoRA adapters (--enable-lora)"),
        (vllm_config.kv_transfer_config, "KV transfer (--kv-transfer-config)"),
        (cache.kv_offloading_size, "KV offloading (--kv-offloading-size)"),
        (cache.kv_cache_dtype_skip_layers, "--kv-cache-dtype-skip-layers"),
        (vllm_config.load_config.download_dir, "--download-dir (HF_HOME moves the hub's folder)"),
        (vllm_config.offload_config.uva.cpu_offload_gb, "--cpu-offload-gb"),
    ):
        if given:
            reasons.append(f"{what} is not supported")
    if vllm_config.load_config.load_format not in LOAD_FORMATS:
        reasons.append(
            f"--load-format {vllm_config.load_config.load_format}: mlx-lm loads safetensors "
            f"(allowed: {', '.join(LOAD_FORMATS)})"
        )
    return reasons + _unsupported_model(vllm_config, compresses=turboquant is not None)


def _unsupported_model(vllm_config: "VllmConfig", compresses: bool) -> list[str]:
    model = vllm_config.model_config
    if model is None:
        return []
    reasons = list(_unknown_model(model))
    if model.runner_type != "generate":
        reasons.append(f"--runner {model.runner_type}: only text generation is supported")
    if model.is_encoder_decoder:
        reasons.append("encoder-decoder models are not supported")
    if callable(model.hf_overrides):
        reasons.append("--hf-overrides as a function is not supported (allowed: a dictionary)")
    if model.enable_prompt_embeds:
        reasons.append("prompt embeddings (--enable-prompt-embeds) are not supported")
    if model.skip_tokenizer_init and compresses:
        reasons.append("--skip-tokenizer-init: TurboQuant reads a text to calibrate its keys")
    if reason := weight_formats.refusal(_weight_settings(model)):
        reasons.append(reason)
    return reasons


def _unknown_model(model: "ModelConfig") -> Iterator[str]:
    from vllm_metal.model.register_models import served_model_types

    model_type, known = model.hf_config.model_type, served_model_types()
    if model_type not in known and not hasattr(model.hf_config, "model_file"):
        yield (
            f"architecture {', '.join(model.architectures)}: mlx-lm has no model of the type "
            f"{model_type} (it has: {', '.join(sorted(known, key=str.lower))})"
        )


def _weight_settings(model: "ModelConfig") -> dict[str, Any]:
    """What `config.json` says about the format of the weights, as vLLM has read it."""
    return {
        "model_type": model.hf_config.model_type,
        "text_config": {"model_type": model.hf_text_config.model_type},
        "quantization": getattr(model.hf_config, "quantization", None),
        "quantization_config": model.model_arch_config.quantization_config,
    }


def _cache_no_prefixes_of_states(vllm_config: "VllmConfig") -> None:
    """Turns prefix caching off where a model has recurrent state.

    vLLM knows of it only for models of its own, so the structure decides. A cached prefix would
    need the state at its end, and a block holds a request's newest state only.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model is None or not cache.enable_prefix_caching:
        return
    load_fast_blas()  # before MLX is first imported
    from vllm_metal.model.model_loader import load_arguments

    if _has_recurrent_state(model.model, json.dumps(load_arguments(model))):
        cache.enable_prefix_caching = False
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = model.max_model_len
        logger.info("Prefix caching is off: %s has recurrent state", model.model)


@cache
def _has_recurrent_state(model: str, load_arguments: str) -> bool:
    """Read once, by what the structure depends on: vLLM checks a configuration many times."""
    from vllm_metal.model.layer_kinds import has_recurrent_state
    from vllm_metal.model.model_loader import load_structure

    return has_recurrent_state(load_structure(model, **json.loads(load_arguments)))


def text_only(model: "ModelConfig") -> None:
    """Makes vLLM refuse images and the like: the worker runs the language model alone."""
    if model.multimodal_config is not None:
        model.multimodal_config.language_model_only = True


def _leave_the_accelerator_alone() -> None:
    """vLLM's shutdown empties the caches of torch's accelerator.

    torch stays on the CPU here. Emptying fails where it has no accelerator, and crashes the process
    on Apple's with torch 2.13.
    """
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.empty_host_cache = lambda: None
