"""`vllm-metal plan`: how much context each format pair gives on a machine, without a server.

The model's config file is enough: the model is built without weights and run dry, so the layers,
sliding windows and recurrent states are those that the server will see.

mlx-lm imports transformers for its tokenizers, and transformers imports torch where it finds it.
Both take most of the time, and no text is read here, so torch is kept out of the process.
"""

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_metal.errors import UserError
from vllm_metal.kv_cache.planner import GIB, MemoryPlan, format_bytes
from vllm_metal.machine.device import Device, mac_working_set, select_device

if TYPE_CHECKING:
    from vllm_metal.model.model_binding import ModelBinding
    from vllm_metal.model.weight_size import WeightSize

WORKSPACE = GIB // 2
"""Bytes that are assumed for a step's temporary memory; a server measures its own."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument(
        "--memory",
        type=parse_size,
        help="RAM of a Mac, e.g. 16GiB (default: this machine). Its GPU may use about two thirds "
        "of it up to 36 GiB, and three quarters of more",
    )
    parser.add_argument(
        "--working-set",
        type=parse_size,
        help="memory that the device may use, in place of what follows from --memory; on a Mac, "
        "what Metal recommends",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        help="part of that memory to use, as in vLLM (default: 0.92)",
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
        "--weights",
        type=parse_size,
        help="size of the weights (default: what the files or config.json say)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code that comes with the model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    if "torch" in sys.modules:
        return _print_plan(args)
    with _torch_left_out():
        from vllm_metal.commands.plan_table import NeedsVLLM

        try:
            return _print_plan(args)
        except NeedsVLLM:
            pass
    print(
        "Layers of several kinds share the pages: asking vLLM how it groups them", file=sys.stderr
    )
    process = multiprocessing.get_context("spawn").Process(target=_end_with_plan, args=(args,))
    process.start()
    process.join()
    return process.exitcode or 0


@contextmanager
def _torch_left_out() -> Iterator[None]:
    """`import torch` fails, as where it is not installed."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _end_with_plan(args: argparse.Namespace) -> None:
    """In a process of its own."""
    try:
        code = _print_plan(args)
    except UserError as error:
        print(error, file=sys.stderr)
        code = 2
    raise SystemExit(code)


def _print_plan(args: argparse.Namespace) -> int:
    from vllm_metal.commands.plan_table import render, table
    from vllm_metal.model import model_loader
    from vllm_metal.model.model_binding import ModelBinding
    from vllm_metal.model.weight_size import WeightSize, weight_size

    named = model_loader.ModelSource(args.model, args.revision)
    folder = named.config_folder()  # asks the Hub once
    source = model_loader.ModelSource(str(folder), None, args.trust_remote_code)
    model = model_loader.load_structure(source)
    binding = ModelBinding(model)
    if args.weights:
        weights = WeightSize(args.weights, "--weights")
    else:
        weights = weight_size(folder, model, source.config().for_mlx_lm)
    plan = MemoryPlan(_device(args), args.gpu_memory_utilization, weights.bytes, WORKSPACE)
    if plan.page_bytes <= 0:
        raise UserError(f"{args.model!r} leaves no memory for the KV cache", _lines(plan, weights))
    longest = getattr(model.args, "max_position_embeddings", None)
    length, block_size = args.max_model_len, args.block_size
    rows, refusal = table(binding, plan.page_bytes, block_size, length, longest, args.model)
    if args.json:
        facts = {
            "device": asdict(plan.device),
            "weights": weights.bytes,
            "weights_from": weights.source,
            "workspace": WORKSPACE,
            "kv_cache_bytes": plan.page_bytes,
            "formats": [asdict(row) for row in rows],
            "turboquant_refused": refusal.reasons if refusal else None,
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{args.model}: {_layers(binding)}", *_lines(plan, weights), sep="\n    ", end="\n\n")
    print(render(rows, args.max_model_len))
    if refusal:
        print(f"\n{refusal}")
    return 0


def _device(args: argparse.Namespace) -> Device:
    """The machine that is asked about."""
    if args.working_set is not None:
        return Device("metal", "the device", args.working_set, 0)
    if args.memory is not None:
        name = f"a Mac with {format_bytes(args.memory)} of RAM"
        return Device("metal", name, mac_working_set(args.memory), 0)
    return select_device()


def _lines(plan: MemoryPlan, weights: "WeightSize") -> list[str]:
    """The memory plan, one term a line, and where a term comes from that was not measured."""
    sources = {"workspace": " (assumed)", "weights": f" (from {weights.source})"}
    lines = [line + sources.get(line.split()[0], "") for line in plan.lines()]
    return [f"memory of {plan.device.name}", *lines]


def _layers(binding: "ModelBinding") -> str:
    """The layers that the cache serves, in words."""
    windows = sum(shape.sliding_window is not None for shape in binding.layers)
    parts = [f"{len(binding.layers)} attention layers"]
    if windows:
        parts.append(f"{windows} of them in a sliding window")
    if binding.states:
        parts.append(f"{len(binding.states)} recurrent states")
    return ", ".join(parts)


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
