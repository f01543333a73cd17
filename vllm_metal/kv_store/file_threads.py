"""Reads and writes files of blocks in the background.

The threads see copies of pages and nothing of MLX. How many bytes are on their way is counted, so
that whoever asks for more can wait. After a write that has failed (the disk is full, the folder is
read-only) nothing more is written: one warning says so.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

from vllm_metal.kv_store import page_file

logger = logging.getLogger("vllm.metal.kv_store")

_READERS = 4

_Tag = TypeVar("_Tag")


class FileThreads(Generic[_Tag]):
    """One thread that writes, in order, and some that read.

    Args:
        key: digest of what the bytes depend on beside the tokens (`key.py`).
    """

    def __init__(self, key: str):
        self.written: SimpleQueue[tuple[_Tag, bool]] = SimpleQueue()
        """What was given to `write`, and whether the file is there now."""
        self.read_payloads: SimpleQueue[tuple[_Tag, bytes | None]] = SimpleQueue()
        """What was given to `read`, and the bytes; None of a file that cannot be used."""
        self.bytes_to_write = 0
        self.num_unusable = 0
        """Files that were to be read and are damaged, foreign or gone."""
        self.write_error: OSError | None = None
        self._key = key
        self._writer = ThreadPoolExecutor(1, "kv-store-write")
        self._readers = ThreadPoolExecutor(_READERS, "kv-store-read")
        self._lock = Lock()

    def write(self, tag: _Tag, path: str, row: np.ndarray, is_wanted: Callable[[], bool]) -> None:
        """Writes the bytes of a block, unless they are no longer wanted by then."""
        self._count(row.nbytes)
        self._writer.submit(self._write, tag, path, row, is_wanted)

    def read(self, tag: _Tag, path: str, num_bytes: int, is_wanted: Callable[[], bool]) -> None:
        """Reads the bytes of a block; deletes the file if it cannot be used."""
        self._readers.submit(self._read, tag, path, num_bytes, is_wanted)

    def delete(self, path: str) -> None:
        """Deletes a file after all that was given to `write` before."""
        self._writer.submit(_delete, path)

    def close(self) -> None:
        """Waits for what is to be written; what is to be read is left."""
        self._writer.shutdown()
        self._readers.shutdown(cancel_futures=True)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_to_write += num_bytes

    def _write(self, tag: _Tag, path: str, row: np.ndarray, is_wanted: Callable[[], bool]) -> None:
        success = False
        try:
            if self.write_error is None and is_wanted():
                page_file.write(path, page_file.identity(self._key, path), row.data)
                success = True
        except OSError as error:
            self.write_error = error
            logger.warning(
                "KV store: no more blocks are written until the server is started again: %s. "
                "Requests are served as before, and blocks on disk are still read",
                error,
            )
        finally:
            self._count(-row.nbytes)
            self.written.put((tag, success))

    def _read(self, tag: _Tag, path: str, num_bytes: int, is_wanted: Callable[[], bool]) -> None:
        payload = None
        try:
            if is_wanted():
                payload = page_file.read(path, page_file.identity(self._key, path), num_bytes)
        except (OSError, page_file.UnusableFileError) as error:
            with self._lock:
                self.num_unusable += 1
            logger.warning("KV store: %s is deleted and computed anew: %s", path, error)
            _delete(path)
        finally:
            self.read_payloads.put((tag, payload))


def _delete(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
