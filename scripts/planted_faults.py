"""Plants known faults in a copy of the repository, and says which of them the tests catch.

    python scripts/planted_faults.py                    every fault
    python scripts/planted_faults.py --only NAME ...    some of them
    python scripts/planted_faults.py --output FILE      write the table to a file, too
    python scripts/planted_faults.py --json FILE        write the results as JSON, too

`planted_faults.json` has the faults: a file, a text that is in it once, what takes its place, and
the tests that should fail. A fault is caught where one of them fails; each must be caught without
the nightly tests. The tests run once without a fault first, because a test that fails anyway
catches nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).with_suffix(".json")

TIMEOUT = 900
"""Seconds for the tests of one fault. A fault that makes them hang is caught."""

PYTEST = (sys.executable, *"-m pytest -x -q -p no:cacheprovider -m".split(), "not nightly")
NOTHING_RAN = (4, 5)
"""pytest's exit codes for a test that does not exist, and for no test at all."""


@dataclass(frozen=True)
class Fault:
    """One planted fault."""

    name: str
    file: str
    """Relative to the repository's root."""
    old: str
    """A text that the file has once."""
    new: str
    tests: tuple[str, ...]
    """pytest's arguments: files, or single tests."""


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a fault."""

    name: str
    file: str
    caught: bool
    by: str
    """The test that failed, or what else ended the run."""
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a fault is not caught, 2 where tests fail without one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these faults alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    args = parser.parse_args(arguments)
    faults = [fault for fault in read_faults() if not args.only or fault.name in args.only]
    if unknown := set(args.only or ()) - {fault.name for fault in faults}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        tree = copy_repository(Path(folder))
        tests = dict.fromkeys(test for fault in faults for test in fault.tests)
        if failed := run_tests(tree, list(tests), timeout=len(faults) * TIMEOUT):
            print(f"These tests fail without a fault: {failed}", file=sys.stderr)
            return 2
        for fault in faults:
            outcomes.append(run_fault(tree, fault))
            print(line(outcomes[-1]), file=sys.stderr, flush=True)
    text = f"{heading()}\n\n{table(outcomes)}\n"
    print(text)
    if args.output:
        args.output.write_text(text)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(not all(outcome.caught for outcome in outcomes))


def read_faults() -> list[Fault]:
    """The faults of `planted_faults.json`."""
    entries = json.loads(FAULTS.read_text())
    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def copy_repository(target: Path) -> Path:
    """Copies the files that git knows, as they are now; returns the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def planted(text: str, fault: Fault) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        ValueError: the old text is not in the file just once.
    """
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {fault.old!r} {count} times, not once")
    return text.replace(fault.old, fault.new)


def run_fault(tree: Path, fault: Fault) -> Outcome:
    """Plants one fault in the tree, runs its tests and takes it out again."""
    file = tree / fault.file
    text = file.read_text()
    file.write_text(planted(text, fault))
    started = time.monotonic()
    try:
        failed = run_tests(tree, fault.tests)
    finally:
        file.write_text(text)
    return Outcome(fault.name, fault.file, bool(failed), failed, time.monotonic() - started)


def run_tests(tree: Path, tests: Sequence[str], timeout: float = TIMEOUT) -> str:
    """The first of these tests that fails in the tree; empty where none does.

    Raises:
        ValueError: pytest does not know a test.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*PYTEST, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {timeout} s"
    if done.returncode in NOTHING_RAN:
        raise ValueError(done.stdout[-500:] + done.stderr[-500:])
    if not done.returncode:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.M)
    return failed[1] if failed else f"pytest ended with {done.returncode}: {done.stderr[-500:]}"


def line(outcome: Outcome, width: int = 0) -> str:
    """One line of the table; names padded to `width`."""
    verdict = "caught" if outcome.caught else "MISSED"
    return f"{verdict}  {outcome.name:<{width}}  {outcome.seconds:4.0f} s  {outcome.by}"


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each fault, and how many are caught."""
    width = max(len(outcome.name) for outcome in outcomes)
    caught = sum(outcome.caught for outcome in outcomes)
    summary = f"{caught} of {len(outcomes)} planted faults are caught"
    return "\n".join([*(line(outcome, width) for outcome in outcomes), "", summary])


def heading() -> str:
    """When, where and with what the table was made."""
    from vllm_metal.machine.provenance import provenance

    about = provenance("mlx", "mlx-lm", "vllm", "pytest")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        "Faults planted by scripts/planted_faults.py, the time that their tests took, and the "
        f"test that failed.\n{about['date']}, {about['machine']}, {about['mlx_device']}; {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
