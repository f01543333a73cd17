"""`vllm-metal doctor`: is this machine right for the kernels, and how fast are they on it?

Compiles the kernels for the chosen formats, compares what they store with the codec byte by byte,
and what they attend and dequantise with its numbers in float32. Measures store, decode and the
dequantisation that prefill begins with, beside dense attention and a copy of as many bytes. Where
MLX has no GPU the kernels are compiled for the CPU and checked; their speed there means nothing.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import numpy as np

from vllm_metal.commands.kernel_trial import GROUP, Trial
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.planner import format_bytes
from vllm_metal.machine.device import select_device
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

PAIRS = ("q8_0/q3_0", "q6_0/q4_0")
BLOCK_SIZE = 16
KV_HEADS, KV_HEADS_ON_HOST = 8, 2
"""Fewer where the CPU runs the kernels, which takes a thousand times as long."""
CHECK_LENGTHS = (1, 17, 300)
CONTEXTS = (1024, 8192, 32768)
TOLERANCES = {mx.float16: 5e-3, mx.bfloat16: 8e-3}
"""Largest |kernel - oracle| / |oracle| by the type of queries, keys and values; keys and queries
are halves in the kernel."""
WINDOW = 9


@dataclass(frozen=True)
class Speed:
    """One context length. Times in microseconds, wall clock, launches included."""

    context: int
    decode_us: float
    dense_us: float
    copy_us: float
    """A copy that reads as many bytes as decode must."""
    gigabytes_per_second: float
    """Compressed bytes read by decode."""
    dequantize_us: float
    """One request's keys and values, for a prefill chunk behind it."""


@dataclass
class Report:
    """What was found about one pair of formats."""

    pair: str
    compile_seconds: float = 0.0
    wrong_bytes: int = 0
    error: float = 0.0
    store_us: float | None = None
    speeds: list[Speed] = field(default_factory=list)
    failure: str = ""
    """What went wrong, or nothing."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--formats", nargs="+", default=list(PAIRS), metavar="KEYS/VALUES")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; returns 1 if a kernel failed. Raises UserError for unknown formats."""
    device = select_device()
    target = available_target() or HostTarget()
    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "device": device.name,
        "memory_limit": device.memory_limit,
        "kernels": target.name,
    }
    kv_heads = KV_HEADS_ON_HOST if target.name == "host" else KV_HEADS
    layouts = [_layout(pair, args.head_size, kv_heads) for pair in args.formats]
    reports = [
        examine(pair, layout, target) for pair, layout in zip(args.formats, layouts, strict=True)
    ]
    failed = any(report.failure for report in reports)
    if args.json:
        print(json.dumps(facts | {"formats": [asdict(r) for r in reports], "ok": not failed}))
    else:
        print(render(facts, reports, args.head_size, kv_heads))
    return int(failed)


def examine(pair: str, layout: PageLayout, target: Target) -> Report:
    """Compiles, checks and, on a GPU, measures the kernels of one pair."""
    report = Report(pair)
    try:
        launcher = Launcher(layout, target)
        start = time.perf_counter()
        check(Trial(launcher, 2), Report(pair))
        report.compile_seconds = time.perf_counter() - start
        for dtype in TOLERANCES:
            for length in CHECK_LENGTHS:
                check(Trial(launcher, length, dtype), report)
        if not report.failure and target.name != "host":
            measure(launcher, report)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        report.failure = f"{type(error).__name__}: {str(error)[:2000]}"
    return report


def check(trial: Trial, report: Report) -> None:
    """Stores, attends, in full and in a window with sinks, and dequantises; keeps the worst."""
    token = trial.store()
    results = [
        (trial.decode(token, **settings), trial.expected(**settings))
        for settings in ({}, {"sinks": trial.sinks, "window": WINDOW})
    ]
    report.wrong_bytes += trial.wrong_bytes()
    results += [
        (got, np.array(plain[-1]))
        for got, plain in zip(trial.dequantize(token), trial.plain(), strict=True)
    ]
    for got, expected in results:
        difference = np.array(got.astype(mx.float32)) - expected
        error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
        report.error = max(report.error, error if np.isfinite(error) else float("inf"))
        if not error < TOLERANCES[trial.dtype]:
            report.failure = f"numbers are off by {error:.1e}"
    if report.wrong_bytes:
        report.failure = f"{report.wrong_bytes} stored bytes differ from the codec's"


def measure(launcher: Launcher, report: Report) -> None:
    """Times store of two tokens, and decode of two requests at each context length."""
    layout = launcher.layout
    small = Trial(launcher, 1)
    report.store_us = _us(lambda: small.store())
    for context in CONTEXTS:
        trial = Trial(launcher, context)
        token = trial.store()
        mx.eval(token)
        shape = 2, layout.num_kv_heads, context, layout.key_head_size
        dense = [mx.random.normal(shape).astype(mx.float16) for _ in range(2)]
        queries = trial.queries.swapaxes(1, 2)
        size = 2 * context * layout.num_kv_heads * layout.slot_size
        source = mx.zeros((size,), mx.uint8)
        mx.eval(dense, source)
        decode = _us(lambda trial=trial, token=token: trial.decode(token))
        dense_us = _us(lambda q=queries, kv=dense: _dense_attention(q, *kv))
        copy = _us(lambda source=source: source + 1)
        plain = _us(lambda trial=trial, token=token: trial.dequantize(token))
        report.speeds.append(Speed(context, decode, dense_us, copy, size / decode / 1e3, plain))


def _dense_attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1)


def render(facts: dict, reports: list[Report], head_size: int, kv_heads: int) -> str:
    """The table and the verdict."""
    lines = [f"{name:13} {value}" for name, value in facts.items() if name != "memory_limit"]
    lines.append(f"{'memory limit':13} {format_bytes(facts['memory_limit'])}")
    lines.append(
        f"\nhead size {head_size}, {kv_heads * GROUP} query and {kv_heads} KV heads, 2 requests"
    )
    for report in reports:
        verdict = report.failure or "right"
        lines.append(
            f"\n{report.pair}: compiled in {report.compile_seconds:.1f} s, bytes "
            f"{'differ' if report.wrong_bytes else 'equal the codec'}, numbers off by "
            f"{report.error:.1e}: {verdict}"
        )
        if report.store_us is not None:
            lines.append(f"  store of 2 tokens {report.store_us:.0f} us")
        if report.speeds:
            lines.append(SPEED_HEADER)
        lines += [
            f"  {speed.context:7} {speed.decode_us:9.0f} {speed.dense_us:8.0f}"
            f" {speed.dense_us / speed.decode_us:7.2f} x {speed.gigabytes_per_second:6.0f}"
            f" {100 * speed.copy_us / speed.decode_us:6.0f} % {speed.dequantize_us:14.0f}"
            for speed in report.speeds
        ]
    if facts["kernels"] == "host":
        lines.append(
            "\nMLX has no GPU here: the kernels ran on the CPU, and their speed means nothing."
        )
    failed = [report.pair for report in reports if report.failure]
    lines.append(f"\nFAILED: {', '.join(failed)}" if failed else "\nThe kernels are right here.")
    return "\n".join(lines)


SPEED_HEADER = "  context decode us dense us    faster   GB/s  of copy  dequantise us"


def _layout(pair: str, head_size: int, kv_heads: int) -> PageLayout:
    try:
        return PageLayout.of(*pair.split("/"), head_size, kv_heads, BLOCK_SIZE)
    except ValueError as error:
        raise UserError(f"--formats {pair} --head-size {head_size}: {error}") from error


def _us(launch, repeats: int = 7, batch: int = 10) -> float:
    """Median wall-clock time of one launch when ten are evaluated together."""
    mx.eval(launch())
    times = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([launch() for _ in range(batch)])
        mx.synchronize()
        times.append((time.perf_counter() - start) / batch * 1e6)
    return statistics.median(times)
