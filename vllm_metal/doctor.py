"""`vllm-metal doctor`: is this machine right for the kernels, and how fast are they on it?

Compiles the kernels for the chosen formats, compares what they store with the codec byte by byte
and what they attend with float32 attention over the codec's own numbers, and measures store and
decode beside dense attention and beside a copy of as many bytes. Where MLX has no GPU the kernels
are compiled for the CPU and checked; their speed there means nothing.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import numpy as np

from vllm_metal.device import select_device
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.planner import format_bytes
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout

PAIRS = ("q8_0/q3_0", "q6_0/q4_0")
KV_HEADS, GROUP, BLOCK_SIZE = 8, 4, 16
CHECK_LENGTHS = (1, 17, 300)
CONTEXTS = (1024, 8192, 32768)
TOLERANCE = 5e-3
"""Largest |kernel - oracle| / |oracle|; keys and queries are halves in the kernel."""


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
    layouts = [_layout(pair, args.head_size) for pair in args.formats]
    reports = [
        examine(pair, layout, target) for pair, layout in zip(args.formats, layouts, strict=True)
    ]
    failed = any(report.failure for report in reports)
    if args.json:
        print(json.dumps(facts | {"formats": [asdict(r) for r in reports], "ok": not failed}))
    else:
        print(render(facts, reports, args.head_size))
    return int(failed)


def examine(pair: str, layout: SlotLayout, target: Target) -> Report:
    """Compiles, checks and, on a GPU, measures the kernels of one pair."""
    report = Report(pair)
    try:
        launcher = Launcher(layout, target)
        start = time.perf_counter()
        check(Trial(launcher, 2), Report(pair))
        report.compile_seconds = time.perf_counter() - start
        for length in CHECK_LENGTHS:
            check(Trial(launcher, length), report)
        if report.wrong_bytes:
            report.failure = f"{report.wrong_bytes} stored bytes differ from the codec's"
        elif not report.error < TOLERANCE:
            report.failure = f"attention is off by {report.error:.1e}"
        elif target.name != "host":
            measure(launcher, report)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        report.failure = f"{type(error).__name__}: {str(error)[:2000]}"
    return report


class Trial:
    """Two requests of random keys and values, stored through the kernel."""

    def __init__(self, launcher: Launcher, length: int):
        layout = launcher.layout
        self.launcher, self.length = launcher, length
        rng = np.random.default_rng(length)
        heads, size = layout.num_kv_heads, layout.key_head_size
        centre = rng.standard_normal((heads, size)).astype(np.float32)
        with mx.stream(mx.cpu):
            self.key_codec = KeyCodec(layout.key_format, centre, np.ones_like(centre))
            self.value_codec = ValueCodec(layout.value_format, size)
            shape = 2 * length, heads, size
            self.keys = mx.array(rng.standard_normal(shape) + centre).astype(mx.float16)
            self.values = mx.array(rng.standard_normal(shape)).astype(mx.float16)
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
        blocks = -(-length // layout.block_size)
        self.table = 1 + rng.permutation(2 * blocks).reshape(2, blocks)
        positions = np.arange(length)
        self.blocks = self.table[:, positions // layout.block_size].reshape(-1)
        self.places = np.tile(positions % layout.block_size, 2)
        self.pages = mx.zeros(layout.pages_shape(2 * blocks + 1), mx.uint16)
        shape = 2, 1, heads * GROUP, size
        self.queries = mx.array(rng.standard_normal(shape)).astype(mx.float16)
        mx.eval(self.pages, self.keys, self.values, self.queries)

    def store(self) -> mx.array:
        slots = self.blocks * self.launcher.layout.block_size + self.places
        slots = mx.array(slots.astype(np.int32))
        return self.launcher.store(self.pages, self.keys, self.values, slots, self.constants)

    def decode(self, token: mx.array) -> mx.array:
        return self.launcher.decode(
            self.pages,
            self.queries,
            mx.array(self.table.astype(np.int32)),
            mx.array([self.length] * 2),
            self.constants,
            self.queries.shape[-1] ** -0.5,
            self.length,
            token,
        )

    def wrong_bytes(self) -> int:
        """Stored codes and key scales that are not the codec's."""
        layout = self.launcher.layout
        with mx.stream(mx.cpu):
            quantized = self.key_codec.quantize(self.keys), self.value_codec.quantize(self.values)
            formats = layout.key_format, layout.value_format
            packed = [pack(q.codes, f.bits) for q, f in zip(quantized, formats, strict=True)]
            codes = [np.array(halfwords).view(np.uint8) for halfwords in packed]
            scales = [np.array(q.scales[..., None]).view(np.uint8) for q in quantized]
        stored = np.array(self.pages).view(np.uint8)
        stored = stored.reshape(len(stored), layout.num_kv_heads, layout.head_page_bytes)
        offsets = layout.key_codes_offset, layout.value_codes_offset
        offsets += layout.key_scales_offset, layout.value_scales_offset
        wrong = 0
        for offset, part in zip(offsets, codes + scales, strict=True):
            size = part.shape[-1]
            columns = offset + self.places[:, None, None] * size + np.arange(size)
            heads = np.arange(layout.num_kv_heads)[None, :, None]
            wrong += int((stored[self.blocks[:, None, None], heads, columns] != part).sum())
        return wrong

    def expected(self) -> np.ndarray:
        """Float32 attention over what the codec makes of the keys and values."""
        with mx.stream(mx.cpu):
            keys = self.key_codec.dequantize(self.key_codec.quantize(self.keys))
            values = self.value_codec.dequantize(self.value_codec.quantize(self.values))
            split = 2, self.length, *keys.shape[1:]
            keys, values = (x.reshape(split).swapaxes(1, 2) for x in (keys, values))
            queries = self.queries.astype(mx.float32).swapaxes(1, 2)
            scale = queries.shape[-1] ** -0.5
            out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
            return np.array(out.swapaxes(1, 2))


def check(trial: Trial, report: Report) -> None:
    """Stores and attends; keeps the worst of what is found."""
    got = np.array(trial.decode(trial.store()).astype(mx.float32))
    report.wrong_bytes += trial.wrong_bytes()
    expected = trial.expected()
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    report.error = max(report.error, error if np.isfinite(error) else float("inf"))


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
        report.speeds.append(Speed(context, decode, dense_us, copy, size / decode / 1e3))


def _dense_attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1)


def render(facts: dict, reports: list[Report], head_size: int) -> str:
    """The table and the verdict."""
    lines = [f"{name:13} {value}" for name, value in facts.items() if name != "memory_limit"]
    lines.append(f"{'memory limit':13} {format_bytes(facts['memory_limit'])}")
    lines.append(
        f"\nhead size {head_size}, {KV_HEADS * GROUP} query and {KV_HEADS} KV heads, 2 requests"
    )
    for report in reports:
        verdict = report.failure or "right"
        lines.append(
            f"\n{report.pair}: compiled in {report.compile_seconds:.1f} s, bytes "
            f"{'differ' if report.wrong_bytes else 'equal the codec'}, attention off by "
            f"{report.error:.1e}: {verdict}"
        )
        if report.store_us is not None:
            lines.append(f"  store of 2 tokens {report.store_us:.0f} us")
        for speed in report.speeds:
            lines.append(
                f"  decode over {speed.context:6} tokens {speed.decode_us:7.0f} us, dense "
                f"{speed.dense_us:7.0f} us ({speed.dense_us / speed.decode_us:.2f} x faster), "
                f"{speed.gigabytes_per_second:5.0f} GB/s, "
                f"{100 * speed.copy_us / speed.decode_us:.0f} % of a copy's speed"
            )
    if facts["kernels"] == "host":
        lines.append(
            "\nMLX has no GPU here: the kernels ran on the CPU, and their speed means nothing."
        )
    failed = [report.pair for report in reports if report.failure]
    lines.append(f"\nFAILED: {', '.join(failed)}" if failed else "\nThe kernels are right here.")
    return "\n".join(lines)


def _layout(pair: str, head_size: int) -> SlotLayout:
    try:
        keys, values = pair.split("/")
        return SlotLayout.of(keys, values, head_size, KV_HEADS, BLOCK_SIZE)
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
