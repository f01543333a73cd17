"""`vllm-metal plan`: how much context each format pair gives on a machine, before it is started.

From the config file alone: the model is built without weights and run dry, so the layer shapes
are those that the server will see.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass

import mlx.core as mx

from vllm_metal import model_loader
from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.config import TurboQuantConfig
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.capacity import CacheSummary, Capacity
from vllm_metal.kv_cache.planner import GIB, format_bytes
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.quality import FORMAT_PAIRS, measured_loss

WORKSPACE = GIB // 2
"""Assumed for activations; a running server measures its own."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    k_quant: str
    v_quant: str
    bits_per_element: float
    ratio: float
    bytes_per_token: float
    tokens: int
    """Tokens in the whole cache."""
    max_context: int
    """Longest single request: `tokens`, bounded by the model's own length."""
    requests: float
    """Requests of `max_model_len` tokens at once."""
    kld: float | None
    """Measured loss, mean KL divergence; None for dense pages or where none is measured."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument(
        "--memory", required=True, type=parse_size, help="memory of the machine, e.g. 16GiB"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, help="as in vLLM (default: 0.92)"
    )
    parser.add_argument(
        "--max-model-len", type=int, default=8192, help="length that 'requests' counts"
    )
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--weights", type=parse_size, help="bytes of weights, where unknown")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    model = model_loader.load_structure(args.model, args.trust_remote_code)
    shapes = _full_attention_layers(args.model, ModelBinding(model))
    weights = args.weights or model_loader.weight_bytes_on_disk(args.model)
    if weights is None:
        weights = model_loader.weight_bytes(model)
    page_bytes = int(args.memory * args.gpu_memory_utilization) - weights - WORKSPACE
    if page_bytes <= 0:
        raise UserError(
            "The weights leave no room for a KV cache",
            [
                f"{format_bytes(args.memory)} x {args.gpu_memory_utilization} - weights "
                f"{format_bytes(weights)} - workspace {format_bytes(WORKSPACE)} "
                f"= {format_bytes(page_bytes)}"
            ],
        )
    longest = getattr(model.args, "max_position_embeddings", None)
    rows = table(shapes, page_bytes, args.block_size, args.max_model_len, longest)
    if args.json:
        facts = {"weights": weights, "workspace": WORKSPACE, "kv_cache_bytes": page_bytes}
        print(json.dumps(facts | {"formats": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{args.model}: {len(shapes)} attention layers")
        print(
            f"KV cache {format_bytes(page_bytes)} = {format_bytes(args.memory)} x "
            f"{args.gpu_memory_utilization} - weights {format_bytes(weights)} - workspace "
            f"{format_bytes(WORKSPACE)} (assumed)\n"
        )
        print(render(rows, args.max_model_len))
    return 0


def _full_attention_layers(name: str, binding: ModelBinding) -> list[LayerShape]:
    """Raises UserError where layers of other kinds share the memory: vLLM's planner divides it."""
    kinds = {
        "sliding windows": any(shape.sliding_window is not None for shape in binding.layers),
        "recurrent state": bool(binding.states),
    }
    if found := [kind for kind, is_there in kinds.items() if is_there]:
        raise UserError(
            "`vllm-metal plan` counts models of full attention only",
            [f"{name} has {' and '.join(found)}; the server prints its plan when it starts"],
        )
    return binding.layers


def table(
    shapes: list[LayerShape],
    page_bytes: int,
    block_size: int,
    max_model_len: int,
    longest: int | None,
) -> list[Row]:
    """Dense pages and every recommended pair, in order of size."""
    rows = []
    for pair in (None, *FORMAT_PAIRS):
        config = None if pair is None else TurboQuantConfig(*pair)
        backends = make_backends(shapes, block_size, mx.float16, config, neutral_constants(shapes))
        summary = CacheSummary.of(backends)
        capacity = Capacity(page_bytes, sum(b.page_size_bytes for b in backends), block_size)
        rows.append(
            Row(
                *(pair or ("dense", "float16")),
                bits_per_element=round(summary.bits_per_element, 3),
                ratio=round(summary.ratio, 3),
                bytes_per_token=summary.bytes_per_token,
                tokens=capacity.tokens,
                max_context=min(capacity.tokens, longest or capacity.tokens),
                requests=round(capacity.requests(max_model_len), 2),
                kld=loss.kld if pair and (loss := measured_loss(*pair)) else None,
            )
        )
    return rows


def render(rows: list[Row], max_model_len: int) -> str:
    """The table as text."""
    heads = ("keys", "values", "bits", "ratio", "tokens", "longest", f"x {max_model_len:,}", "KLD")
    lines = [
        (
            row.k_quant,
            row.v_quant,
            f"{row.bits_per_element:.2f}",
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
    """Bytes of `16GiB`, `16GB`, `512MiB` or a plain number.

    Raises:
        argparse.ArgumentTypeError: it is none of these.
    """
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": GIB}
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmg]?)(i?b)?\s*", text.lower())
    try:
        return int(float(match[1]) * units[match[2]])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size (examples: 16GiB, 512MiB, 17179869184)"
        ) from None
