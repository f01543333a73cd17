"""`vllm-metal eval`: measures format pairs on a model and a text."""

import argparse
import json
import os
import platform
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from vllm_metal.errors import UserError
from vllm_metal.quality import FORMAT_PAIRS

WINDOWS, WINDOW_TOKENS = 3, 1024
BLOCK_SIZE = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument("--text", type=Path, help="text file (default: Python's documentation)")
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="K/V",
        default=["/".join(pair) for pair in FORMAT_PAIRS],
        help="format pairs, e.g. q8_0/q3_0 (default: all that `plan` shows)",
    )
    parser.add_argument(
        "--block-affine",
        nargs="*",
        metavar="K/V",
        default=[],
        help="bits of block-affine keys and Lloyd-Max values to measure beside, e.g. 8/3",
    )
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    parser.add_argument("--max-model-len", type=int, help="length that keys are calibrated for")
    parser.add_argument("--no-needles", action="store_true", help="leave the needle test out")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="write a plot of loss against bits here, as PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints a table; returns the exit code."""
    pairs = [_parse_pair(pair) for pair in args.pairs]
    from vllm_metal.blas import load_fast_blas

    blas = load_fast_blas()
    import mlx.core as mx
    import mlx_lm

    from vllm_metal.attention.model_binding import ModelBinding
    from vllm_metal.evaluation.block_affine import BlockAffine
    from vllm_metal.evaluation.fidelity import compare
    from vllm_metal.key_samples import collect_key_samples
    from vllm_metal.metal_kernel_backend.dense import DensePages
    from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantReference
    from vllm_metal.metal_kernel_backend.turboquant.calibration import calibrate

    model, tokenizer = mlx_lm.load(args.model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    binding = ModelBinding(model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    text = args.text.read_text() if args.text else "".join(pydoc_data.topics.topics.values())
    token_ids = encode(text)
    wanted = args.windows * args.window_tokens
    if len(token_ids) < wanted:
        raise UserError(f"The text has {len(token_ids)} tokens; {wanted} are needed")
    stride = len(token_ids) // args.windows
    windows = [token_ids[i * stride :][: args.window_tokens] for i in range(args.windows)]
    constants = calibrate(
        lambda ids, offset: collect_key_samples(binding, ids, offset),
        encode,
        args.max_model_len or args.window_tokens,
    )

    def compressed(pair) -> Callable[[], Sequence]:
        return lambda: [
            TurboQuantReference(shape, BLOCK_SIZE, pair, layer_constants, reproducible=True)
            for shape, layer_constants in zip(binding.layers, constants, strict=True)
        ]

    def block_affine(bits: tuple[int, int]) -> Callable[[], Sequence]:
        return lambda: [BlockAffine(shape, BLOCK_SIZE, *bits) for shape in binding.layers]

    candidates = {f"{k.name}/{v.name}": compressed((k, v)) for k, v in pairs}
    for bits in args.block_affine:
        candidates[f"block-affine {bits}"] = block_affine(tuple(map(int, bits.split("/"))))
    dense = [DensePages(shape, BLOCK_SIZE, mx.float32) for shape in binding.layers]
    started = time.perf_counter()

    def progress(what: str) -> None:
        print(f"\r{time.perf_counter() - started:6.0f} s  {what:<60}", end="", file=sys.stderr)

    fidelity, perplexity = compare(binding, dense, candidates, windows, progress)
    results = {}
    for name, make in candidates.items():
        backend = make()[0]
        bits = getattr(backend, "bits_per_element", None) or backend.layout.bits_per_element
        results[name] = {"bits_per_element": bits, "ratio": 16 / bits} | fidelity[name].summary()
    if not args.no_needles:
        _add_needles(binding, dense, candidates, token_ids, encode, tokenizer, results, progress)
    print(file=sys.stderr)
    figures = {
        "model": Path(args.model).name,
        "text": str(args.text) if args.text else f"pydoc_data.topics, Python {sys.version[:6]}",
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "mlx_device": str(mx.default_device()),
        "blas": blas,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "windows": args.windows,
        "window_tokens": args.window_tokens,
        "dense_perplexity": perplexity,
        "pairs": results,
    }
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        plot(figures, args.plot)
    return 0


def _add_needles(
    binding, dense, candidates, token_ids, encode, tokenizer, results, progress
) -> None:
    from vllm_metal.evaluation.needle import find_needles

    progress("needles: dense")
    expected = find_needles(binding, dense, token_ids, encode, tokenizer.decode)
    for name, make in candidates.items():
        progress(f"needles: {name}")
        found = find_needles(binding, make(), token_ids, encode, tokenizer.decode)
        kept = sum(a.found for a, b in zip(found, expected, strict=True) if b.found)
        results[name] |= {
            "needles_found": sum(needle.found for needle in found),
            "needles_kept": kept,
            "needles_found_dense": sum(needle.found for needle in expected),
            "needles": len(expected),
        }


def table(results: dict[str, dict]) -> str:
    """The figures as text, one candidate a line."""
    lines = [
        f"{'keys/values':<18}{'bits':>6}{'ratio':>7}{'KLD':>9}{'ppl ratio':>11}{'top-1':>8}"
        f"{'decode KLD':>12}{'needles':>9}"
    ]
    for name, row in results.items():
        needles = "-"
        if "needles" in row:
            needles = f"{row['needles_kept']}/{row['needles_found_dense']}"
        lines.append(
            f"{name:<18}{row['bits_per_element']:>6.2f}{row['ratio']:>6.2f}x{row['kld']:>9.4f}"
            f"{row['perplexity_ratio']:>11.4f}{row['top1_agreement']:>8.1%}"
            f"{row['decode_kld']:>12.4f}{needles:>9}"
        )
    return "\n".join(lines)


def plot(figures: dict, path: Path) -> None:
    """Loss against bits, both kinds of formats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    kinds = {"TurboQuant, this plugin": "o", "block-affine keys, RMS values": "s"}
    for (label, marker), affine in zip(kinds.items(), (False, True), strict=True):
        rows = {
            name: row
            for name, row in figures["pairs"].items()
            if name.startswith("block-affine") is affine
        }
        if not rows:
            continue
        axes.margins(x=0.12)
        bits = [row["bits_per_element"] for row in rows.values()]
        axes.plot(bits, [row["kld"] for row in rows.values()], marker, label=label)
        for i, (name, row) in enumerate(rows.items()):
            axes.annotate(
                name.removeprefix("block-affine "),
                (row["bits_per_element"], row["kld"]),
                xytext=(6, 5) if i % 2 else (6, -11),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per key or value element, metadata included")
    axes.set_ylabel("mean KL divergence from the dense cache (nats)")
    axes.set_title(f"{figures['model']}, {figures['windows']} x {figures['window_tokens']} tokens")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)


def _parse_pair(text: str):
    from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format

    try:
        key, value = text.split("/")
        return key_format(key), value_format(value)
    except ValueError as error:
        raise UserError(f"--pairs {text!r} is not K_QUANT/V_QUANT", [str(error)]) from error
