"""Plants known faults in a copy of the repository, and says which of them the tests catch.

    python scripts/planted_faults.py                    every fault
    python scripts/planted_faults.py --only NAME ...    some of them
    python scripts/planted_faults.py --output FILE      write the table to a file, too
    python scripts/planted_faults.py --journal FILE     keep each outcome, and go on from there
    python scripts/planted_faults.py --root FOLDER --faults FILE    another tree, another list

`planted_faults.json` has the faults: a file, a text that is in it once, what takes its place, and
the tests that should fail. A fault is caught where one of them fails; each must be caught without
the nightly tests. The tests run once without a fault first, because a test that fails anyway
catches nothing.

A run over all faults takes hours. The journal has one JSON object a line, written as soon as its
fault is through. A run that was stopped goes on when it is started again with the same journal;
faults whose entry in the list has changed since are planted again.
"""

import argparse
import hashlib
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

    def digest(self) -> str:
        """The same for the same fault with the same tests."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


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
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="keep outcomes here; skip those it has"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="FOLDER", help="the repository to copy"
    )
    parser.add_argument(
        "--faults", type=Path, default=FAULTS, metavar="FILE", help="the list of faults"
    )
    args = parser.parse_args(arguments)
    listed = read_faults(args.faults)
    if unknown := set(args.only or ()) - {fault.name for fault in listed}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [fault for fault in listed if not args.only or fault.name in args.only]
    outcomes = read_journal(args.journal, faults) if args.journal else {}
    if left := [fault for fault in faults if fault.name not in outcomes]:
        with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
            tree = copy_repository(args.root, Path(folder))
            tests = dict.fromkeys(test for fault in left for test in fault.tests)
            if failed := run_tests(tree, list(tests), timeout=len(left) * TIMEOUT):
                print(f"These tests fail without a fault: {failed}", file=sys.stderr)
                return 2
            for fault in left:
                outcome = outcomes[fault.name] = run_fault(tree, fault)
                print(line(outcome), file=sys.stderr, flush=True)
                if args.journal:
                    append_to_journal(args.journal, fault, outcome)
    in_order = [outcomes[fault.name] for fault in faults]
    text = f"{heading(args.root)}\n\n{table(in_order)}\n"
    print(text)
    if args.output:
        args.output.write_text(text)
    return int(not all(outcome.caught for outcome in in_order))


def read_journal(journal: Path, faults: Sequence[Fault]) -> dict[str, Outcome]:
    """Name of a fault -> its outcome, for those of these faults that the journal has."""
    digests = {fault.name: fault.digest() for fault in faults}
    entries = journal.read_text().splitlines() if journal.exists() else []
    outcomes = {}
    for entry in map(json.loads, entries):
        digest = entry.pop("digest")
        if digests.get(entry["name"]) == digest:
            outcomes[entry["name"]] = Outcome(**entry)
    return outcomes


def append_to_journal(journal: Path, fault: Fault, outcome: Outcome) -> None:
    """Writes one line, and closes the file: a run may be stopped at any time."""
    with journal.open("a") as file:
        file.write(json.dumps(asdict(outcome) | {"digest": fault.digest()}) + "\n")


def read_faults(file: Path = FAULTS) -> list[Fault]:
    """The faults of `planted_faults.json`, or of another list."""
    entries = json.loads(file.read_text())
    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def git(root: Path, *arguments: str) -> str:
    """What a command of git prints in a repository."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def copy_repository(root: Path, target: Path) -> Path:
    """Copies the files that git knows, as they are now; returns the folder."""
    for name in filter(None, git(root, "ls-files", "-z").split("\0")):
        source, copy = root / name, target / name
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


def heading(root: Path) -> str:
    """When, where, with what and of which commit the table was made."""
    from vllm_metal.machine.provenance import provenance

    about = provenance("mlx", "mlx-lm", "vllm", "pytest")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = git(root, "describe", "--always", "--dirty").strip()
    return (
        "Faults planted by scripts/planted_faults.py, the time that their tests took, and the "
        f"test that failed.\n{about['date']}, {about['machine']}, {about['mlx_device']}; "
        f"{versions}; commit {commit}"
    )


if __name__ == "__main__":
    sys.exit(main())
