"""The cache of one model under one configuration: its pages, and what a number of bytes holds.

The worker, `/metrics` and `vllm-metal plan` ask here, so that they tell the same figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import torch

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.config import dense_dtype, parse
from vllm_metal.kv_cache.capacity import CacheSummary, Capacity
from vllm_metal.kv_cache.spec import capacity, kv_cache_specs
from vllm_metal.metal_kernel_backend.selection import Calibrate, make_backends
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.model.model_loader import mlx_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass(frozen=True)
class ModelPages:
    """Pages of a model's layers and its recurrent states."""

    vllm_config: "VllmConfig"
    backends: Sequence[AttentionBackend]
    states: Sequence[StateShape]

    @classmethod
    def of(
        cls,
        vllm_config: "VllmConfig",
        layers: Sequence[LayerShape],
        states: Sequence[StateShape],
        calibrate: Calibrate,
    ) -> "ModelPages":
        """What `vllm_config` asks for.

        Raises:
            UserError: a layer that is to be compressed cannot be.
        """
        cache, model = vllm_config.cache_config, vllm_config.model_config
        turboquant = parse(vllm_config.additional_config, cache.cache_dtype)
        dtype = mlx_dtype(dense_dtype(cache.cache_dtype, model.dtype))
        return cls.with_pages(vllm_config, layers, states, dtype, turboquant, calibrate)

    @classmethod
    def with_pages(
        cls,
        vllm_config: "VllmConfig",
        layers: Sequence[LayerShape],
        states: Sequence[StateShape],
        dtype: mx.Dtype,
        turboquant: TurboQuantConfig | None,
        calibrate: Calibrate,
    ) -> "ModelPages":
        """Pages of one's own choice; else as `of`."""
        block_size = vllm_config.cache_config.block_size
        backends = make_backends(layers, block_size, dtype, turboquant, calibrate, states)
        return cls(vllm_config, backends, states)

    @property
    def summary(self) -> CacheSummary:
        """Of the attention layers."""
        return CacheSummary.of(self.backends)

    def specs(self, max_model_len: int) -> "dict[str, KVCacheSpec]":
        """What vLLM's planner is told."""
        model = self.vllm_config.model_config
        dtype = torch.float16  # `vllm-metal plan` has no model
        if model is not None:
            assert isinstance(model.dtype, torch.dtype), "vLLM has resolved the type by now"
            dtype = model.dtype
        return kv_cache_specs(self.backends, dtype, self.states, max_model_len)

    def capacity(self, page_bytes: int, max_model_len: int) -> Capacity:
        """What `page_bytes` hold."""
        return capacity(self.vllm_config, self.specs(max_model_len), page_bytes)

    def dense_capacity(self, page_bytes: int, max_model_len: int) -> Capacity:
        """What they would hold in 16-bit pages."""
        layers = [backend.shape for backend in self.backends]
        dense = ModelPages.with_pages(self.vllm_config, layers, self.states, mx.float16, None, list)
        return dense.capacity(page_bytes, max_model_len)

    def ratio(self, max_model_len: int) -> float:
        """`Capacity.ratio` to 16-bit pages, for whoever does not know the bytes."""
        dense = self.dense_capacity(0, max_model_len)
        return self.capacity(0, max_model_len).ratio(dense, max_model_len)
