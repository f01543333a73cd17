"""Remembers a start that did not survive the tracing of decode, so that the next one does without.

MLX builds and launches traced steps in this process. A fault in there, such as a division by zero
in the C++ of a backend, ends the process; nothing in Python can catch it. So a file says that
tracing is under way, and whoever finds it left behind by a process that is gone does not trace.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil


class CrashMarker:
    """The file for one thing that is tried: a line that names the process, and what it depends on.

    Args:
        folder: where the file is; None: nothing is marked.
        depends_on: what the outcome depends on, as `dependencies` gives it. Once anything of it
            changes, it is tried again.
    """

    def __init__(self, folder: Path | None, depends_on: Mapping[str, Any]):
        self._depends_on = json.dumps(depends_on, sort_keys=True)
        name = hashlib.sha256(self._depends_on.encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / name

    @property
    def left_behind(self) -> bool:
        """Whether a process that is gone was in the middle of it."""
        if self.path is None:
            return False
        try:
            owner, *_ = self.path.read_text().splitlines()
        except (OSError, ValueError):
            return False
        return owner not in {_identity(process) for process in _running(owner)}

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Marks the block as under way. Where the file cannot be written, it is not marked."""
        if self.path is None:
            yield
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(f"{_identity(psutil.Process())}\n{self._depends_on}\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _identity(process: psutil.Process) -> str:
    """Names a process for good: numbers of processes are used again."""
    return f"{process.pid} {process.create_time():.2f}"


def _running(owner: str) -> list[psutil.Process]:
    """The process that has the owner's number now, if any."""
    try:
        return [psutil.Process(int(owner.split()[0]))]
    except (psutil.Error, ValueError, IndexError):
        return []
