"""The files of a store's folder: which there are, how large, and which was used least recently.

The folder holds the files of every model and every setting that it was used with, and the size
limit is for all of them. The time of last use is a file's modification time, so that the order
survives a restart. Other servers may write to the folder: a file that is not in the index is looked
for on disk, and the folder is read anew in the background after every sixteenth of the limit that
was written.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vllm_metal.kv_store.page_file import UNFINISHED

_SETTINGS_FOLDER = re.compile(r".*_[0-9a-f]{12}_r\d+")
_BLOCK_FOLDER = re.compile(r"[0-9a-f]{2}_g\d+")
_BLOCK_FILE = re.compile(r"[0-9a-f]+\.bin")
"""The names that vLLM's `FileMapper` gives. Whatever else lies in the folder is not touched."""

ABANDONED_S = 3600
"""Seconds after which a file that is still unfinished belongs to a process that was killed."""

TOUCH_INTERVAL_NS = 600 * 10**9
"""A use is written to disk if the last one there is older than this."""

_SCANS_PER_LIMIT = 16


@dataclass(slots=True)
class _File:
    size: int
    used: int
    """Time of last use in ns, and its place in the order."""
    used_on_disk: int
    """The time of last use that the file system has."""


class FolderIndex:
    """Not for several threads: what runs in the background changes nothing here.

    Args:
        folder: of the store; need not exist.
        max_bytes: that its files may take.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of the files in the index."""
        self.num_evicted = 0
        self._files: dict[str, _File] = {}
        """Path -> file, least recently used first."""
        self._in_use: dict[str, int] = {}
        """Path -> how many loads read it."""
        self._background = ThreadPoolExecutor(1, "kv-store-index")
        self._scan: Future[tuple[int, dict[str, _File]]] | None = None
        self._written_since_scan = 0
        self._take(*_scan(folder))

    def __contains__(self, path: str) -> bool:
        """Whether the file is there, also if another server wrote it."""
        return path in self._files or self.add(path)

    def paths(self) -> list[str]:
        """The files in the index, least recently used first."""
        return list(self._files)

    def add(self, path: str) -> bool:
        """Takes a file into the index, as used now; False if there is none on disk."""
        try:
            stat = os.stat(path)
        except OSError:
            self.drop(path)
            return False
        self.drop(path)
        self._files[path] = _File(stat.st_size, time.time_ns(), stat.st_mtime_ns)
        self.num_bytes += stat.st_size
        self._written_since_scan += stat.st_size
        return True

    def drop(self, path: str) -> None:
        """Takes a file out of the index; it stays on disk."""
        if file := self._files.pop(path, None):
            self.num_bytes -= file.size

    def remove(self, path: str) -> None:
        """Deletes a file, and its folder if that is empty then."""
        self.drop(path)
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))
            os.rmdir(os.path.dirname(os.path.dirname(path)))

    def touch(self, paths: Iterable[str]) -> None:
        """Notes that files are used, the last one most recently."""
        now, old = time.time_ns(), []
        for path in paths:
            if file := self._files.pop(path, None):
                self._files[path] = file
                file.used = now = now + 1
                if now - file.used_on_disk > TOUCH_INTERVAL_NS:
                    file.used_on_disk = now
                    old.append((path, now))
        if old:
            self._background.submit(_write_times, old)

    def hold(self, paths: Iterable[str]) -> None:
        """Keeps files from being evicted until `release`."""
        for path in paths:
            self._in_use[path] = self._in_use.get(path, 0) + 1

    def release(self, paths: Iterable[str]) -> None:
        """The reverse of `hold`."""
        for path in paths:
            count = self._in_use.pop(path, 1) - 1
            if count > 0:
                self._in_use[path] = count

    def make_room(self, num_bytes: int) -> bool:
        """Evicts files until so many bytes fit; False if they do not."""
        self._rescan()
        if num_bytes > self.max_bytes:
            return False
        if self.num_bytes + num_bytes > self.max_bytes:
            for path in self.paths():
                if path not in self._in_use:
                    self.remove(path)
                    self.num_evicted += 1
                if self.num_bytes + num_bytes <= self.max_bytes:
                    break
        return self.num_bytes + num_bytes <= self.max_bytes

    def close(self) -> None:
        """Ends the thread in the background."""
        self._background.shutdown()

    def _rescan(self) -> None:
        if self._scan is not None and self._scan.done():
            self._take(*self._scan.result())
            self._scan = None
        if self._scan is None and self._written_since_scan > self.max_bytes // _SCANS_PER_LIMIT:
            self._written_since_scan = 0
            self._scan = self._background.submit(_scan, self.folder)

    def _take(self, started: int, found: dict[str, _File]) -> None:
        """Takes what a scan has found; files that were added since it began stay."""
        for path, file in self._files.items():
            if path in found:
                found[path].used = max(file.used, found[path].used)
            elif file.used >= started:
                found[path] = file
        self._files = dict(sorted(found.items(), key=lambda item: item[1].used))
        self.num_bytes = sum(file.size for file in found.values())


def _scan(folder: Path) -> tuple[int, dict[str, _File]]:
    """The time at which it began, and all files; deletes those that a killed process left."""
    started, found = time.time_ns(), {}
    for path in _block_folders(folder):
        for entry in _entries(path):
            with contextlib.suppress(OSError):  # another server deletes files, too
                stat = entry.stat(follow_symlinks=False)
                if entry.name.startswith(UNFINISHED):
                    if started - stat.st_mtime_ns > ABANDONED_S * 10**9:
                        os.unlink(entry.path)
                elif _BLOCK_FILE.fullmatch(entry.name):
                    found[entry.path] = _File(stat.st_size, stat.st_mtime_ns, stat.st_mtime_ns)
    return started, found


def _block_folders(folder: Path) -> Iterator[str]:
    for of_settings in _entries(folder):
        if _SETTINGS_FOLDER.fullmatch(of_settings.name):
            for of_hashes in _entries(of_settings.path):
                for of_blocks in _entries(of_hashes.path):
                    if _BLOCK_FOLDER.fullmatch(of_blocks.name):
                        yield of_blocks.path


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing if it is none, or is gone."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _write_times(used: list[tuple[str, int]]) -> None:
    for path, time_ns in used:
        with contextlib.suppress(OSError):  # gone, or the folder is read-only
            os.utime(path, ns=(time_ns, time_ns))
