"""What a start with TurboQuant measures: constants of the keys, and the loss of the formats.

Both come from an earlier start where nothing that they depend on has changed.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.config import dense_dtype
from vllm_metal.metal_kernel_backend.turboquant.calibration import TEXT, KeyConstants, calibrate
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.model.model_loader import mlx_dtype
from vllm_metal.model_pages import ModelPages
from vllm_metal.startup import dependencies, loss_check
from vllm_metal.startup.key_samples import collect_key_samples
from vllm_metal.startup.loss_check import CompressionLoss
from vllm_metal.startup.prompt_beginning import Encode, prompt_beginning
from vllm_metal.startup.result_cache import COMPRESSION_LOSS, KEY_CONSTANTS, ResultCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.metal.startup")


def key_constants(
    binding: ModelBinding, encode: Encode, max_model_len: int, results: ResultCache
) -> list[KeyConstants]:
    """The constants of every layer's keys, for sequences of up to `max_model_len` tokens.

    Args:
        binding: the model.
        encode: the tokenizer's.
        max_model_len: tokens.
        results: where they are kept.
    """
    texts = _texts(encode)

    def measure() -> list[KeyConstants]:
        started = time.perf_counter()
        constants = calibrate(
            lambda token_ids, offset: collect_key_samples(binding, token_ids, offset),
            *texts,
            max_model_len,
        )
        logger.info("TurboQuant keys calibrated in %.1f s", time.perf_counter() - started)
        return constants

    depends_on = dependencies.of_key_constants(*texts, max_model_len)
    return results.get(KEY_CONSTANTS, depends_on, measure)


def check_loss(
    vllm_config: "VllmConfig",
    binding: ModelBinding,
    encode: Encode,
    constants: Sequence[KeyConstants],
    turboquant: TurboQuantConfig,
    results: ResultCache,
) -> None:
    """Says what the formats cost this model on the calibration text.

    Args:
        vllm_config: of the server.
        binding: the model.
        encode: the tokenizer's.
        constants: of every layer's keys.
        turboquant: the user's choice.
        results: where the loss is kept.

    Raises:
        UserError: the loss is more than the user has accepted; see `loss_check.judge`.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    texts = _texts(encode)
    token_ids = [*texts[0], *texts[1]][: min(loss_check.TOKENS, model.max_model_len)]
    dtype = mlx_dtype(dense_dtype(cache.cache_dtype, model.dtype))

    def backends(choice: TurboQuantConfig | None) -> Sequence[AttentionBackend]:
        layers, states = binding.layers, binding.states
        pages = (vllm_config, layers, states, dtype, choice, lambda: constants)
        return ModelPages.with_pages(*pages).backends

    def measure() -> CompressionLoss:
        compressed = backends(replace(turboquant, reproducible=True))
        return loss_check.measure_loss(binding, backends(None), compressed, token_ids)

    depends_on = dependencies.of_key_constants(*texts, model.max_model_len)
    depends_on |= dependencies.of_compression_loss(turboquant, len(binding.layers), str(dtype))
    loss = results.get(COMPRESSION_LOSS, depends_on, measure)
    loss_check.judge(loss, str(turboquant.formats), turboquant.accepts_loss)


def _texts(encode: Encode) -> tuple[list[int], list[int]]:
    """What every prompt begins with, and the calibration text after it, as token ids."""
    return prompt_beginning(encode), encode(TEXT, add_special_tokens=False)
