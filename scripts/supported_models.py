"""Writes `docs/supported_models.md`: what is served of every architecture that mlx-lm knows.

    python scripts/supported_models.py                  check all of them, write the page
    python scripts/supported_models.py --only NAME ...  check these again
    python scripts/supported_models.py --check NAME ... write nothing; exit 1 unless the page is
                                                        current as far as these show

Each architecture is checked in a process of its own (`architecture_check`), so that a crash is one
architecture's result. The results are kept in `supported_models.json`; the page says no more.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from supported_models_page import page

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "supported_models.md"

TIMEOUT = 300
"""Seconds for one architecture."""

_PRELOAD = [
    "mlx_lm.utils",
    "vllm_metal.metal_kernel_backend.selection",
    "vllm_metal.startup.decode_probe",
]
"""Imported once, by the process that all others are forked from. None of it evaluates anything,
after which MLX would hang in a fork."""

Results = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for a page that is not current, or an architecture that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME", help="check these again")
    which.add_argument("--check", nargs="*", metavar="NAME", help="write nothing; check these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    args = parser.parse_args(arguments)
    if args.check is not None:
        return _check_is_current(args.check, args.jobs)
    results = json.loads(RESULTS.read_text())["architectures"] if args.only else {}
    results |= run(args.only or _architectures(), args.jobs)
    committed = {
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "aliases": _aliases(),
        "architectures": dict(sorted(results.items(), key=lambda item: item[0].lower())),
    }
    RESULTS.write_text(json.dumps(committed, indent=1) + "\n")
    PAGE.write_text(page(committed))
    wrong = [name for name, result in results.items() if "wrong" in statuses(result)]
    if wrong:
        print("wrong: " + ", ".join(wrong), file=sys.stderr)
    return int(bool(wrong))


def run(names: Iterable[str], jobs: int) -> Results:
    """Checks the architectures, `jobs` at a time."""
    names = list(names)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results: Results = {}
    with ThreadPoolExecutor(jobs) as pool:
        for name, result in zip(
            names, pool.map(lambda name: _run_one(context, name), names), strict=True
        ):
            results[name] = result
            _show_progress(len(results), len(names), name)
    print(file=sys.stderr)
    return results


def differences(found: Results, committed: Results) -> list[str]:
    """What a new run says otherwise than the committed results, one line each.

    Figures are left out: they depend on the machine.
    """
    lines = []
    for name, result in found.items():
        old, new = _without_figures(committed.get(name)), _without_figures(result)
        if old != new:
            lines.append(f"{name}: {json.dumps(new)}, not {json.dumps(old)}")
    return lines


def _check_is_current(names: Sequence[str], jobs: int) -> int:
    committed = json.loads(RESULTS.read_text())
    problems = differences(run(names, jobs), committed["architectures"]) if names else []
    if PAGE.read_text() != page(committed):
        problems.append(f"{PAGE.name} is not what {RESULTS.name} makes")
    if missing := set(_architectures()) ^ set(committed["architectures"]):
        problems.append(f"without a result, or without a model: {', '.join(sorted(missing))}")
    print("\n".join(problems))
    return int(bool(problems))


def _run_one(context: Any, name: str) -> dict[str, Any]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT):
            return receiver.recv()
        problem = f"no result after {TIMEOUT} s"
    except EOFError:
        process.join()
        problem = f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    outcome = {"status": "wrong", "reasons": [problem]}
    return {"kinds": [], "notes": [], "dense": outcome, "turboquant": outcome}


def _send_result(name: str, sender: Connection) -> None:
    from architecture_check import check

    sender.send(check(name))


def _architectures() -> tuple[str, ...]:
    from tiny_architectures import ARCHITECTURES, model_files

    if missing := model_files() ^ set(ARCHITECTURES):
        raise SystemExit(f"tiny_architectures.json and mlx-lm differ in {sorted(missing)}")
    return ARCHITECTURES


def _aliases() -> dict[str, str]:
    """Model types that mlx-lm runs with another type's file."""
    from mlx_lm.utils import MODEL_REMAPPING

    return dict(sorted(MODEL_REMAPPING.items()))


def statuses(result: dict[str, Any]) -> set[str]:
    return {result["dense"]["status"], result["turboquant"]["status"]}


def _without_figures(result: dict[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    kept = ("status", "reasons", "batched_decode")
    modes = {
        mode: {key: result[mode][key] for key in kept if key in result[mode]}
        for mode in ("dense", "turboquant")
    }
    return {"kinds": result["kinds"], **modes}


def _show_progress(done: int, total: int, name: str) -> None:
    bar = "#" * (30 * done // total)
    print(f"\r[{bar:<30}] {done}/{total} {name:<24}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
