"""`vllm-metal eval`: measures format pairs on a model and a text."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS

if TYPE_CHECKING:
    from vllm_metal.evaluation.study import Study

WINDOWS, WINDOW_TOKENS, LONG_WINDOW_TOKENS = 3, 1024, 6000


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--text", type=Path, help="text file (default: Python's documentation)")
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="K/V",
        default=[str(pair) for pair in SHOWN_PAIRS],
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
    parser.add_argument(
        "--long-window-tokens",
        type=int,
        default=LONG_WINDOW_TOKENS,
        help="tokens of one long window, 0 for none",
    )
    parser.add_argument("--max-model-len", type=int, help="length that keys are calibrated for")
    parser.add_argument("--no-needles", action="store_true", help="leave the needle test out")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="write a plot of loss against bits here, as PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints a table; returns the exit code. Raises UserError."""
    from vllm_metal.machine.blas import load_fast_blas

    blas = load_fast_blas()
    from vllm_metal.evaluation.arguments import read_text, study_of
    from vllm_metal.evaluation.study import measure
    from vllm_metal.machine.device import select_device
    from vllm_metal.machine.provenance import check_files
    from vllm_metal.model import model_loader
    from vllm_metal.model.model_binding import ModelBinding
    from vllm_metal.startup.prompt_beginning import prompt_beginning

    study, text = study_of(args), read_text(args.text)
    check_files(args.output, args.plot)
    select_device()
    source = model_loader.ModelSource(args.model, args.revision, args.trust_remote_code)
    tokenizer = model_loader.load_tokenizer(args.model, args.revision, args.trust_remote_code)
    model = model_loader.load_model(source, "float32")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids)))

    beginning = prompt_beginning(tokenizer.encode)
    texts = encode(text), encode, decode
    measured = measure(study, ModelBinding(model), *texts, progress_line(), beginning)
    print(file=sys.stderr)
    figures = describe(study, Path(args.model).name, args.text, blas) | measured
    print(table(figures["pairs"]))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        plot(figures, args.plot)
    return 0


def progress_line() -> Callable[[str], None]:
    """Shows seconds and the current item in one line on stderr."""
    started = time.perf_counter()

    def progress(what: str) -> None:
        print(f"\r{time.perf_counter() - started:6.0f} s  {what:<60}", end="", file=sys.stderr)

    return progress


def describe(study: "Study", model: str, text: Path | None, blas: str | None) -> dict:
    """Where and on what the figures were measured."""
    from vllm_metal.machine.provenance import provenance
    from vllm_metal.metal_kernel_backend.kernel_library import available_target

    target = available_target()
    return {
        "model": model,
        "text": str(text) if text else f"pydoc_data.topics, Python {sys.version[:6]}",
        **provenance("mlx", "mlx-lm"),
        "kernels": target.name if target else "none, MLX operations",
        "blas": blas,
        "windows": study.windows,
        "window_tokens": study.window_tokens,
        "long_window_tokens": study.long_window_tokens,
    }


def table(results: dict[str, dict]) -> str:
    """The figures as text, one candidate a line."""
    lines = [
        f"{'keys/values':<18}{'bits':>6}{'ratio':>7}{'KLD':>9}{'ppl ratio':>11}{'top-1':>8}"
        f"{'decode KLD':>12}{'long KLD':>10}{'attention':>11}{'needles':>9}"
    ]
    for name, row in results.items():
        needles = "-"
        if "needles" in row:
            needles = f"{row['needles_kept']}/{row['needles_found_dense']}"
        long = f"{row['long_window_kld']:.4f}" if "long_window_kld" in row else "-"
        lines.append(
            f"{name:<18}{row['bits_per_element']:>6.2f}{row['ratio']:>6.2f}x{row['kld']:>9.4f}"
            f"{row['perplexity_ratio']:>11.4f}{row['top1_agreement']:>8.1%}"
            f"{row['decode_kld']:>12.4f}{long:>10}{row['attention_error']:>11.4f}{needles:>9}"
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
