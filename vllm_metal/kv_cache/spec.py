"""Tells vLLM's scheduler and planner about each layer's pages, and reads their answer.

The bytes of a page travel in `state_content_bytes`, the bytes of one KV head of one token, which
vLLM compares when it merges layers into groups, and in `page_size_padded`.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    is_full_attention_spec,
    iter_layer_specs,
)

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.capacity import Capacity
from vllm_metal.kv_cache.groups import AttentionGroup, CacheLayout, KVGroup, Region, StateGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_CACHE_LAYOUT = "LBNHC"
"""vLLM's name for one region per layer, block-major inside it."""


@dataclass(frozen=True, kw_only=True)
class _Formats:
    """The fields that compressed pages add to a spec of vLLM's."""

    k_quant: str = ""
    v_quant: str = ""


@dataclass(frozen=True, kw_only=True)
class TurboQuantAttentionSpec(_Formats, FullAttentionSpec):
    """Full attention over compressed pages."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The spec of a group; vLLM's own keeps no field that it does not know.

        Raises:
            AssertionError: the layers cannot be in one group. vLLM finds out by trying, and catches
                this error alone.
        """
        first = specs[0]
        for spec in specs:
            if type(spec) is not cls or (spec.k_quant, spec.v_quant) != (
                first.k_quant,
                first.v_quant,
            ):
                raise AssertionError("layers of one group have one key and one value format")
        return replace(super().merge(specs), k_quant=first.k_quant, v_quant=first.v_quant)


@dataclass(frozen=True, kw_only=True)
class TurboQuantSlidingWindowSpec(_Formats, SlidingWindowSpec):
    """A sliding window over compressed pages."""


@dataclass(frozen=True, kw_only=True)
class KeptStateSpec(MambaSpec):
    """A recurrent state whose blocks the prefix cache keeps (vLLM's mode "align").

    vLLM admits a request only if there are free blocks for all that it will hold and for what it
    copies first. Where a prefix ends inside of blocks, the request gets copies of these blocks, one
    in each group. vLLM's own spec leaves these out, and a request would wait for ever in a pool
    that holds it but not the copies. Where all layers are recurrent, requests in a pool of two
    blocks would preempt each other for ever.
    """

    spare_blocks: int = 0
    """Blocks for such copies: this group's own, and its share of those of attention groups."""

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes that have to be free for the states of one request."""
        copies = self.spare_blocks * self.page_size_bytes
        return super().max_memory_usage_bytes(vllm_config) + copies


def layer_name(layer: int) -> str:
    """Name of an attention layer towards vLLM."""
    return f"layers.{layer}"


def state_name(state: int) -> str:
    """Name of a recurrent state towards vLLM."""
    return f"states.{state}"


def kv_cache_specs(
    backends: Sequence[AttentionBackend],
    dtype: torch.dtype,
    states: Sequence[StateShape] = (),
    max_model_len: int = 0,
    state_block_size: int | None = None,
) -> dict[str, KVCacheSpec]:
    """One spec for each layer and each recurrent state.

    Args:
        backends: one for each attention layer.
        dtype: element type of the model.
        states: shapes of the recurrent states.
        max_model_len: tokens that the one block of a recurrent state is said to hold where no
            prefixes of such a model are cached.
        state_block_size: tokens between two states that the prefix cache may keep; None where it
            keeps none.
    """
    page_bytes = max(
        [state.page_bytes for state in states] + [b.page_size_bytes for b in backends], default=0
    )
    specs: dict[str, KVCacheSpec] = {
        layer_name(layer): _attention_spec(backend, dtype) for layer, backend in enumerate(backends)
    }
    for i, state in enumerate(states):
        kind = KeptStateSpec if state_block_size else MambaSpec
        specs[state_name(i)] = kind(
            block_size=state_block_size or max_model_len,
            shapes=((state.page_bytes,),),
            dtypes=(torch.uint8,),
            page_size_padded=page_bytes if page_bytes > state.page_bytes else None,
            mamba_cache_mode="align" if state_block_size else "none",
        )
    return specs


def with_spare_blocks(
    vllm_config: "VllmConfig", specs: dict[str, KVCacheSpec]
) -> dict[str, KVCacheSpec]:
    """The same specs, with room for copies of the blocks in which prefixes end."""
    groups = get_kv_cache_groups(_with_layout(vllm_config), dict(specs))
    states = sum(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)
    copied = -(-len(groups) // states)
    return {
        name: replace(spec, spare_blocks=copied) if isinstance(spec, KeptStateSpec) else spec
        for name, spec in specs.items()
    }


def _attention_spec(backend: AttentionBackend, dtype: torch.dtype) -> KVCacheSpec:
    shape, window = backend.shape, backend.shape.sliding_window
    kind: type[FullAttentionSpec | SlidingWindowSpec]
    fields: dict[str, Any] = {}
    if backend.format_names is not None:
        kind = TurboQuantAttentionSpec if window is None else TurboQuantSlidingWindowSpec
        k_quant, v_quant = backend.format_names
        fields |= {"k_quant": k_quant, "v_quant": v_quant}
    else:
        kind = FullAttentionSpec if window is None else SlidingWindowSpec
    if window is not None:
        fields["sliding_window"] = window
    spec = kind(
        block_size=backend.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        head_size_v=shape.head_size_v,
        dtype=dtype,
        state_content_bytes=backend.slot_size,
        **fields,
    )
    if spec.page_size_bytes == backend.page_size_bytes:
        return spec
    return replace(spec, page_size_padded=backend.page_size_bytes)


def cache_layout(planned: KVCacheConfig) -> CacheLayout:
    """Groups and regions of vLLM's plan.

    Raises:
        ValueError: layers overlap that do not share a whole region, so that the plan cannot be
            followed.
    """
    groups: list[KVGroup] = []
    for group in planned.kv_cache_groups:
        spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
        layers, states = _numbers(group.layer_names)
        if states:
            assert isinstance(spec, MambaSpec)
            held, spare = 1, 0
            if isinstance(spec, KeptStateSpec):
                held, spare = 2, spec.spare_blocks
            groups.append(StateGroup(states, spec.block_size, held, spare))
            continue
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        groups.append(AttentionGroup(spec.block_size, layers, window))
    names: dict[int, list[str]] = {}
    strides: dict[int, int] = {}
    for tensor in planned.kv_cache_tensors:
        for i, name in enumerate(tensor.layers):
            start = tensor.offset + i * tensor.layer_stride
            names.setdefault(start, []).append(name)
            if strides.setdefault(start, tensor.block_stride) != tensor.block_stride:
                raise ValueError(f"layers {names[start]} share memory with unequal pages")
    end = 0
    for start in sorted(names):
        if start < end:
            raise ValueError(f"layers {names[start]} overlap others")
        end = start + strides[start] * planned.num_blocks
    regions = [Region(strides[start], *_numbers(names[start])) for start in sorted(names)]
    return CacheLayout(tuple(groups), tuple(regions))


def capacity(
    vllm_config: "VllmConfig",
    specs: dict[str, KVCacheSpec],
    page_bytes: int,
    max_model_len: int = 0,
) -> Capacity:
    """What fits in `page_bytes`, by vLLM's own grouping of the layers.

    It works before vLLM has settled the layout, too, as in the process that serves `/metrics`.
    """
    vllm_config = _with_layout(vllm_config)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    layout = cache_layout(get_kv_cache_config_from_groups(vllm_config, groups, 1 << 50))
    bytes_per_block = sum(region.page_bytes for region in layout.regions)
    block_size = next(iter(iter_layer_specs(groups[0].kv_cache_spec))).block_size
    if len(layout.groups) == 1 and is_full_attention_spec(groups[0].kv_cache_spec):
        return Capacity(page_bytes, bytes_per_block, block_size)
    step_tokens = vllm_config.max_in_flight_tokens
    return Capacity(
        page_bytes, bytes_per_block, block_size, layout.groups, step_tokens, max_model_len
    )


def _with_layout(vllm_config: "VllmConfig") -> "VllmConfig":
    """A copy for vLLM's planner, which asks for a layout that is settled."""
    vllm_config = copy(vllm_config)
    vllm_config.cache_config = copy(vllm_config.cache_config)
    vllm_config.cache_config.kv_cache_layout = KV_CACHE_LAYOUT
    return vllm_config


@dataclass(frozen=True)
class BlockTableSize:
    """The block table of one KV group, as vLLM's `InputBatch` holds it."""

    block_size: int
    """Tokens from one entry of the table to the next."""
    num_blocks: int
    """Blocks of the longest request, freed ones included."""


def block_table_sizes(vllm_config: "VllmConfig", planned: KVCacheConfig) -> list[BlockTableSize]:
    """The block table of each group."""
    longest = vllm_config.model_config.max_model_len
    return [
        BlockTableSize(spec.block_size, spec.max_num_blocks_per_req(vllm_config, longest))
        for spec in (group.kv_cache_spec for group in planned.kv_cache_groups)
    ]


def _numbers(names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Attention layers and recurrent states among these names."""
    kinds: dict[str, list[int]] = {"layers": [], "states": []}
    for name in names:
        kind, number = name.split(".")
        kinds[kind].append(int(number))
    return tuple(kinds["layers"]), tuple(kinds["states"])
