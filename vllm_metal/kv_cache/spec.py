"""What vLLM's scheduler and planner are told of each layer's pages."""

from collections.abc import Sequence

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_metal.attention.backend import AttentionBackend


def layer_name(layer: int) -> str:
    """Name of an attention layer towards vLLM."""
    return f"layers.{layer}"


def kv_cache_specs(
    backends: Sequence[AttentionBackend], dtype: torch.dtype
) -> dict[str, KVCacheSpec]:
    """One spec for each layer.

    The bytes of a page travel in `state_content_bytes`, the bytes of one KV head of one token,
    which vLLM compares when it merges layers into groups.
    """
    return {
        layer_name(layer): FullAttentionSpec(
            block_size=backend.block_size,
            num_kv_heads=backend.shape.num_kv_heads,
            head_size=backend.shape.head_size,
            head_size_v=backend.shape.head_size_v,
            dtype=dtype,
            state_content_bytes=backend.slot_size,
        )
        for layer, backend in enumerate(backends)
    }
