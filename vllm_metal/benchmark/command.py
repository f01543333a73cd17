"""`vllm-metal bench`: decode steps and first tokens of a model on this machine."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_metal.errors import UserError

if TYPE_CHECKING:
    from vllm_metal.benchmark.one_engine import Task

REQUESTS, CONTEXTS, MINUTES, CHUNK = (1, 4, 16), (1024, 8192, 32768), 5.0, 2048
LOG_LINES = 5
"""Of a failed engine's log that are shown."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", help="model folder or Hugging Face name")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--formats",
        nargs="*",
        metavar="KEYS/VALUES",
        default=["q8_0/q3_0"],
        help="format pairs to measure beside dense pages (default: q8_0/q3_0)",
    )
    parser.add_argument(
        "--requests", nargs="+", type=int, default=REQUESTS, help="that run together"
    )
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens of each prompt"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="that all engines may take together; what would take longer is left out, the largest "
        f"cases first (default: {MINUTES:g})",
    )
    parser.add_argument("--no-mlx-lm", action="store_true", help="leave mlx-lm's generation out")
    parser.add_argument(
        "--chunk", type=int, default=CHUNK, help=f"prompt tokens at a time (default: {CHUNK})"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, help="as for `vllm serve` (default: vLLM's)"
    )
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", type=Path, help="write a plot here, as PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints a table; returns 1 where an engine failed. Raises UserError."""
    check(args)
    from vllm_metal.benchmark.engines import DENSE, MLX_LM, Settings
    from vllm_metal.benchmark.one_engine import Task
    from vllm_metal.benchmark.report import plot, table
    from vllm_metal.benchmark.timing import cases
    from vllm_metal.machine.device import select_device
    from vllm_metal.machine.provenance import provenance

    every = cases(args.requests, args.contexts)
    settings = Settings(
        args.model,
        args.revision,
        args.trust_remote_code,
        max(args.contexts),
        max(args.requests),
        args.chunk,
        args.gpu_memory_utilization,
    )
    engines = [MLX_LM] * (not args.no_mlx_lm) + [DENSE, *args.formats]
    end = time.monotonic() + 60 * args.minutes
    figures = {}
    for i, name in enumerate(engines):
        seconds = max(0.0, end - time.monotonic()) / (len(engines) - i)
        figures[name] = measured(Task(name, settings, every, seconds))
    device = select_device()
    facts = {
        "model": Path(args.model).name,
        "device": device.name,
        **provenance("vllm", "mlx", "mlx-lm", "vllm-metal-turboquant"),
        "chunk": args.chunk,
    }
    found = facts | {"engines": figures}
    title = f"{facts['model']}, {facts['device']}, {facts['date']}"
    print(json.dumps(found) if args.json else f"\n{title}\n\n{table(figures)}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        plot(figures, title, args.plot)
    return int(any("failed" in rows[0] for rows in figures.values()))


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what is not allowed, before any model is loaded."""
    from vllm_metal.machine.provenance import check_files
    from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair

    for option, values in (("--requests", args.requests), ("--contexts", args.contexts)):
        if min(values) < 1:
            raise UserError(f"{option} {min(values)} is not allowed (allowed: 1 or more)")
    for option, value in (("--chunk", args.chunk), ("--minutes", args.minutes)):
        if value <= 0:
            raise UserError(f"{option} {value:g} is not allowed (allowed: more than 0)")
    for pair in args.formats:
        try:
            parse_pair(pair)
        except ValueError as error:
            raise UserError(f"--formats {pair}: {error}") from error
    check_files(args.output, args.plot)


def measured(task: "Task") -> list[dict]:
    """Runs a task in a process of its own, and shows its lines as they come."""
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder) / "results", Path(folder) / "log"
        results.touch()
        command = [
            sys.executable,
            "-m",
            "vllm_metal.benchmark.one_engine",
            task.to_json(),
            str(results),
        ]
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
        shown = 0
        print(f"{task.engine}: loading", file=sys.stderr, flush=True)
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    shown = _show(task.engine, results, shown)
            finally:
                process.kill()
        _show(task.engine, results, shown)
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        if process.returncode:
            last = [line for line in log.read_text().splitlines() if line.strip()][-LOG_LINES:]
            print("\n".join(last), file=sys.stderr)
            failed = {"failed": last[-1] if last else f"exit code {process.returncode}"}
            rows = [failed, *rows[1:]]
        return rows


def _show(engine: str, results: Path, shown: int) -> int:
    lines = results.read_text().splitlines()
    for line in lines[shown:]:
        print(f"{engine}: {_summary(json.loads(line))}", file=sys.stderr, flush=True)
    return len(lines)


def _summary(row: dict) -> str:
    if "cache_tokens" in row:
        return "loaded"
    from vllm_metal.benchmark.report import case_of

    case = case_of(row)
    if "skipped" in row:
        return f"{case} not run: {row['skipped']}"
    return f"{case}: {row['step_milliseconds']:.2f} ms a step"
