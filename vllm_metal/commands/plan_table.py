"""The table of `vllm-metal plan`: what a number of bytes holds with each pair of formats.

The figures come from the functions that the server uses. Where layers of different kinds share the
pages, vLLM groups them, which needs vLLM; a model with one kind of layer needs neither vLLM nor
torch.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.capacity import CacheSummary, Capacity, has_one_group
from vllm_metal.kv_cache.planner import format_bytes
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import (
    SHOWN_PAIRS,
    Loss,
    measured_loss,
)
from vllm_metal.model.model_binding import ModelBinding

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class NeedsVLLM(Exception):
    """The layers have to be grouped by vLLM, and torch is kept out of this process."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    k_quant: str
    v_quant: str
    bits_per_element: float | None
    """Stored bits of a key or value element; None where a model has no keys and values."""
    ratio: float
    """Requests of `max_model_len` tokens that fit, relative to dense 16-bit pages."""
    bytes_per_request: int
    """Bytes of a request of `max_model_len` tokens."""
    tokens: int
    """Length of the one request that fills the cache."""
    max_context: int
    """Longest request: `tokens`, bounded by the model's own length."""
    requests: float
    """Requests of `max_model_len` tokens that fit at the same time."""
    match_tokens: int | None
    """Cached prefixes are found at multiples of so many tokens; None where the model has no
    recurrent state, so that they are found at the end of every block."""
    state_bytes: int
    """Bytes that the recurrent states of one cached prefix take; 0 where there are none."""
    kept_states: int
    """Cached prefixes whose states fit beside one request of `max_model_len` tokens."""
    kld: float | None
    """Measured mean KL divergence in nats; None for dense pages, and for pairs not measured."""
    kld_model: str | None
    """The model that it was measured on: this one, or the nearest of those that were measured."""


def table(
    binding: ModelBinding,
    page_bytes: int,
    block_size: int,
    max_model_len: int,
    longest: int | None,
    model: str = "",
) -> tuple[list[Row], UserError | None]:
    """A row for dense pages and for every shown pair, in the order of their bytes.

    Where TurboQuant refuses the model, the row of dense pages alone and the refusal.

    Args:
        binding: the model's structure.
        page_bytes: bytes for pages.
        block_size: tokens of a block.
        max_model_len: tokens of the requests that are counted.
        longest: tokens of the longest request that the model can read; None: not known.
        model: its name or folder, by which a measured loss of the same model is found.

    Raises:
        NeedsVLLM: see there.
    """
    pages_of = _pages_of(binding, page_bytes, block_size, max_model_len)
    head_size = binding.layers[0].head_size if binding.layers else None
    rows: list[Row] = []
    dense: Capacity | None = None
    for pair in (None, *SHOWN_PAIRS):
        turboquant = None if pair is None else TurboQuantConfig(pair)
        try:
            backends, capacity = pages_of(turboquant)
        except UserError as refusal:
            return rows, refusal
        dense = dense or capacity
        loss = pair and measured_loss(pair, model, head_size)
        rows.append(_row(backends, pair, loss, capacity, dense, max_model_len, longest))
    return rows, None


_PagesOf = Callable[[TurboQuantConfig | None], tuple[Sequence[AttentionBackend], Capacity]]
"""The pages of the layers with these formats, dense with None, and what they hold.

Raises:
    UserError: TurboQuant cannot compress the model.
"""


def _pages_of(
    binding: ModelBinding, page_bytes: int, block_size: int, max_model_len: int
) -> _PagesOf:
    layers, states = binding.layers, binding.states
    constants = neutral_constants(layers)
    if has_one_group(layers, states):

        def one_group(
            turboquant: TurboQuantConfig | None,
        ) -> tuple[Sequence[AttentionBackend], Capacity]:
            backends = make_backends(layers, block_size, mx.float16, turboquant, constants)
            return backends, Capacity.of_one_group(backends, page_bytes)

        return one_group
    if sys.modules.get("torch", sys) is None:
        raise NeedsVLLM
    from vllm_metal.model_pages import ModelPages
    from vllm_metal.options.state_caching import set_state_caching

    vllm_config = _quiet_config()
    vllm_config.cache_config.block_size = block_size
    set_state_caching(vllm_config, bool(states))

    def grouped(
        turboquant: TurboQuantConfig | None,
    ) -> tuple[Sequence[AttentionBackend], Capacity]:
        pages = ModelPages.with_pages(
            vllm_config, layers, states, mx.float16, turboquant, constants
        )
        return pages.backends, pages.capacity(page_bytes, max_model_len)

    return grouped


def _quiet_config() -> "VllmConfig":
    """vLLM's default configuration, without the log lines of its construction."""
    from vllm.config import VllmConfig

    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return VllmConfig()
    finally:
        logger.setLevel(level)


def _row(
    backends: Sequence[AttentionBackend],
    pair: FormatPair | None,
    loss: Loss | None,
    capacity: Capacity,
    dense: Capacity,
    max_model_len: int,
    longest: int | None,
) -> Row:
    bits = CacheSummary.of(backends).bits_per_element if backends else None
    return Row(
        *((pair.key.name, pair.value.name) if pair else ("dense", "float16")),
        bits_per_element=None if bits is None else round(bits, 3),
        ratio=round(capacity.ratio(dense, max_model_len), 3),
        bytes_per_request=capacity.bytes_for(max_model_len),
        tokens=capacity.tokens,
        max_context=min(capacity.tokens, longest or capacity.tokens),
        requests=round(capacity.requests(max_model_len), 2),
        match_tokens=capacity.match_tokens,
        state_bytes=capacity.kept_state_bytes,
        kept_states=0 if capacity.match_tokens is None else capacity.kept_states(max_model_len),
        kld=loss.kld if loss else None,
        kld_model=loss.model if loss else None,
    )


def render(rows: Sequence[Row], max_model_len: int) -> str:
    """The table as text, with the model that each loss was measured on."""
    heads = (
        *("keys", "values", "bits", "ratio", "tokens", "longest", f"x {max_model_len:,}"),
        *("KLD", "measured on"),
    )
    lines = [
        (
            row.k_quant,
            row.v_quant,
            "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}",
            f"{row.ratio:.2f}x",
            f"{row.tokens:,}",
            f"{row.max_context:,}",
            f"{row.requests:.1f}",
            "-" if row.kld is None else f"{row.kld:.4f}",
            row.kld_model or "-",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= i < 8 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (heads, *lines)
    )
    if kept := _kept_states(rows):
        text += f"\n\n{kept}"
    if any(row.kld is not None for row in rows):
        text += (
            "\n\nKLD: mean KL divergence from dense pages, in nats, on the model that is named "
            "beside it.\nOther models lose more or less: a server measures its own loss when it "
            "starts"
        )
    return text


def _kept_states(rows: Sequence[Row]) -> str:
    """What the prefix cache keeps of a model with recurrent state, in words."""
    lines = [
        f"    {row.k_quant}/{row.v_quant}: found at multiples of {row.match_tokens:,} tokens, "
        f"{format_bytes(row.state_bytes)} of states each, room for {row.kept_states:,}"
        for row in rows
        if row.match_tokens is not None
    ]
    return "\n".join(["prefixes in the cache, beside one request:", *lines] if lines else [])
