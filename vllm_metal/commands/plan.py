"""`vllm-metal plan`: how much context each format pair gives on a machine, without a server.

The model's config file is enough: the model is built without weights and run dry, so the layers,
sliding windows and recurrent states are those that the server will see. The figures come from the
functions that the server uses (`ModelPages`), with vLLM's own grouping of the layers.
"""

import argparse
import json
import logging
import re
from dataclasses import asdict, dataclass

import mlx.core as mx
from vllm.config import VllmConfig

from vllm_metal.errors import UserError
from vllm_metal.kv_cache.planner import GIB, format_bytes
from vllm_metal.metal_kernel_backend.selection import neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS, measured_loss
from vllm_metal.model import model_loader
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.model_pages import ModelPages

WORKSPACE = GIB // 2
"""Bytes that are assumed for a step's temporary memory; a server measures its own."""


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
    kld: float | None
    """Measured mean KL divergence in nats; None for dense pages, and for pairs not measured."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument(
        "--memory", required=True, type=parse_size, help="memory limit of the device, e.g. 16GiB"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        help="part of the memory to use, as in vLLM (default: 0.92)",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=8192,
        help="tokens of the requests that are counted (default: 8192)",
    )
    parser.add_argument(
        "--block-size", type=int, default=16, help="tokens of a block, as in vLLM (default: 16)"
    )
    parser.add_argument(
        "--weights", type=parse_size, help="size of the weights (default: that of the files)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code that comes with the model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    model = model_loader.load_structure(args.model, args.revision, args.trust_remote_code)
    binding = ModelBinding(model)
    weights = args.weights or model_loader.weight_bytes_on_disk(args.model)
    if weights is None:
        weights = model_loader.weight_bytes(model)
    page_bytes = int(args.memory * args.gpu_memory_utilization) - weights - WORKSPACE
    if page_bytes <= 0:
        raise UserError(
            f"{args.model!r} leaves no memory for the KV cache",
            [
                f"{format_bytes(args.memory)} x {args.gpu_memory_utilization} - weights "
                f"{format_bytes(weights)} - workspace {format_bytes(WORKSPACE)} "
                f"= {format_bytes(page_bytes)}"
            ],
        )
    longest = getattr(model.args, "max_position_embeddings", None)
    rows, refusal = table(binding, page_bytes, args.block_size, args.max_model_len, longest)
    if args.json:
        facts = {"weights": weights, "workspace": WORKSPACE, "kv_cache_bytes": page_bytes}
        refused = refusal.reasons if refusal else None
        facts |= {"formats": [asdict(row) for row in rows], "turboquant_refused": refused}
        print(json.dumps(facts, indent=2))
    else:
        print(f"{args.model}: {_layers(binding)}")
        print(
            f"KV cache {format_bytes(page_bytes)} = {format_bytes(args.memory)} x "
            f"{args.gpu_memory_utilization} - weights {format_bytes(weights)} - workspace "
            f"{format_bytes(WORKSPACE)} (assumed)\n"
        )
        print(render(rows, args.max_model_len))
        if refusal:
            print(f"\n{refusal}")
    return 0


def _layers(binding: ModelBinding) -> str:
    """The layers that the cache serves, in words."""
    windows = sum(shape.sliding_window is not None for shape in binding.layers)
    parts = [f"{len(binding.layers)} attention layers"]
    if windows:
        parts.append(f"{windows} of them in a sliding window")
    if binding.states:
        parts.append(f"{len(binding.states)} recurrent states")
    return ", ".join(parts)


def table(
    binding: ModelBinding,
    page_bytes: int,
    block_size: int,
    max_model_len: int,
    longest: int | None,
) -> tuple[list[Row], UserError | None]:
    """A row for dense pages and for every shown pair, in the order of their bytes.

    Where TurboQuant refuses the model, the row of dense pages alone and the refusal.
    """
    vllm_config = _quiet_config()
    vllm_config.cache_config.block_size = block_size
    rows: list[Row] = []
    for pair in (None, *SHOWN_PAIRS):
        try:
            cache = ModelPages.with_pages(
                vllm_config,
                binding.layers,
                binding.states,
                mx.float16,
                None if pair is None else TurboQuantConfig(pair),
                neutral_constants(binding.layers),
            )
        except UserError as refusal:
            return rows, refusal
        rows.append(_row(cache, pair, page_bytes, max_model_len, longest))
    return rows, None


def _quiet_config() -> VllmConfig:
    """vLLM's default configuration, without the log lines of its construction."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return VllmConfig()
    finally:
        logger.setLevel(level)


def _row(
    cache: ModelPages,
    pair: FormatPair | None,
    page_bytes: int,
    max_model_len: int,
    longest: int | None,
) -> Row:
    capacity = cache.capacity(page_bytes, max_model_len)
    return Row(
        *((pair.key.name, pair.value.name) if pair else ("dense", "float16")),
        bits_per_element=round(cache.summary.bits_per_element, 3) if cache.backends else None,
        ratio=round(cache.ratio(max_model_len), 3),
        bytes_per_request=capacity.bytes_for(max_model_len),
        tokens=capacity.tokens,
        max_context=min(capacity.tokens, longest or capacity.tokens),
        requests=round(capacity.requests(max_model_len), 2),
        kld=loss.kld if pair and (loss := measured_loss(pair)) else None,
    )


def render(rows: list[Row], max_model_len: int) -> str:
    """The table as text."""
    heads = ("keys", "values", "bits", "ratio", "tokens", "longest", f"x {max_model_len:,}", "KLD")
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
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (heads, *lines)
    )


def parse_size(text: str) -> int:
    """The bytes of a size such as `16GiB`, `16GB`, `512MiB` or `17179869184`.

    Raises:
        argparse.ArgumentTypeError: the text is not a size.
    """
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": GIB}
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmg]?)(i?b)?\s*", text.lower())
    try:
        number, unit = match.group(1, 2) if match else (text, "")
        return int(float(number) * units[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size (examples: 16GiB, 512MiB, 17179869184)"
        ) from None
