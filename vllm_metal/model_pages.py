"""The cache of one model under one configuration: its pages, and what a number of bytes holds.

The worker, `/metrics` and `vllm-metal plan` ask here, so that they tell the same figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import torch

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.page_sizes import TOKEN_STEP, StateCaching, match_unit
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.config import dense_dtype, parse
from vllm_metal.kv_cache.capacity import CacheSummary, Capacity
from vllm_metal.kv_cache.spec import capacity, kv_cache_specs, with_spare_blocks
from vllm_metal.metal_kernel_backend.selection import Calibrate, make_backends
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.model.model_loader import mlx_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


def state_caching(vllm_config: "VllmConfig") -> StateCaching | None:
    """How the prefixes of models with recurrent state are cached; None where they are not."""
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if cache.mamba_cache_mode != "align":
        return None
    step_tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    longest_chunk = scheduler.long_prefill_token_threshold or step_tokens
    return StateCaching(
        min(step_tokens, longest_chunk),
        step_tokens,
        scheduler.max_num_seqs,
        cache.prefix_match_unit,
    )


@dataclass(frozen=True)
class ModelPages:
    """Pages of a model's layers and its recurrent states."""

    vllm_config: "VllmConfig"
    backends: Sequence[AttentionBackend]
    states: Sequence[StateShape]
    block_size: int
    """Tokens of a block as it was asked for. vLLM's configuration has that of the planner later."""
    caching: StateCaching | None
    """Likewise."""

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
        asked: "ModelPages | None" = None,
    ) -> "ModelPages":
        """Pages of one's own choice; else as `of`, or as `asked` was asked for."""
        block_size = asked.block_size if asked else vllm_config.cache_config.block_size
        caching = asked.caching if asked else state_caching(vllm_config)
        backends = make_backends(layers, block_size, dtype, turboquant, calibrate, states, caching)
        return cls(vllm_config, backends, states, block_size, caching)

    @property
    def state_block_size(self) -> int | None:
        """Tokens between two recurrent states that the prefix cache may keep.

        The smallest block of all layers (`page_sizes`). None without states, or where their
        prefixes are not cached.
        """
        if not self.states or self.caching is None:
            return None
        blocks = [backend.block_size for backend in self.backends]
        if not blocks:
            return self.caching.block_size(self.block_size, TOKEN_STEP)
        return min(blocks)

    @property
    def match_unit(self) -> int | None:
        """vLLM's `prefix_match_unit`: the user's, or one for the blocks of a hybrid.

        None where prefixes are found at the ends of blocks alone: without states, without
        attention, with sliding windows (vLLM looks for them at whole blocks), or in small blocks.
        """
        given = self.vllm_config.cache_config.prefix_match_unit
        if self.caching is not None:
            given = self.caching.match_unit
        smallest = self.state_block_size
        if given is not None or smallest is None or not self.backends or self._has_windows:
            return given
        return match_unit(smallest)

    @property
    def match_tokens(self) -> int | None:
        """Prefixes of a model with recurrent state are found at multiples of so many tokens."""
        smallest = self.state_block_size
        return smallest if self._has_windows else smallest and self.match_unit or smallest

    @property
    def _has_windows(self) -> bool:
        return any(backend.shape.sliding_window is not None for backend in self.backends)

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
        smallest, finest = self.state_block_size, self.match_tokens
        specs = kv_cache_specs(self.backends, dtype, self.states, max_model_len, smallest)
        if smallest is not None and (finest != smallest or not self.backends):
            return with_spare_blocks(self.vllm_config, specs)
        return specs

    def capacity(self, page_bytes: int, max_model_len: int) -> Capacity:
        """What `page_bytes` hold."""
        holds = capacity(self.vllm_config, self.specs(max_model_len), page_bytes, max_model_len)
        return replace(holds, match_tokens=self.match_tokens)

    def dense_capacity(self, page_bytes: int, max_model_len: int) -> Capacity:
        """What they would hold in 16-bit pages."""
        layers = [backend.shape for backend in self.backends]
        dense = ModelPages.with_pages(
            self.vllm_config, layers, self.states, mx.float16, None, list, self
        )
        return dense.capacity(page_bytes, max_model_len)

    def ratio(self, max_model_len: int) -> float:
        """`Capacity.ratio` to 16-bit pages, for whoever does not know the bytes."""
        dense = self.dense_capacity(0, max_model_len)
        return self.capacity(0, max_model_len).ratio(dense, max_model_len)
