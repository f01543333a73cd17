"""Files of blocks: whole or absent, and refused when they are not what their name says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_metal.kv_store import page_file

NUM_BYTES = 5000
PAYLOAD = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
KEY = "k" * 64


def write(path: Path, key: str = KEY, payload: np.ndarray = PAYLOAD) -> None:
    page_file.write(str(path), page_file.identity(key, str(path)), payload.data)


def read(path: Path, key: str = KEY) -> bytes:
    return page_file.read(str(path), page_file.identity(key, str(path)), NUM_BYTES)


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "store" / "0ab" / "cd_g0" / "0abcd.bin"
    write(path)
    return path


def test_what_was_written_is_read(path):
    assert read(path) == PAYLOAD.tobytes()
    assert path.stat().st_size == page_file.file_bytes(NUM_BYTES)
    assert page_file.file_bytes(NUM_BYTES) < 1.01 * NUM_BYTES


def test_nobody_else_may_read(path, tmp_path):
    assert path.stat().st_mode & 0o777 == 0o600
    for folder in (path.parent, path.parent.parent, tmp_path / "store"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_missing_file_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.bin")


def damaged(content: bytes) -> list[bytes]:
    """20 files that a crash, a disk or a mistake may leave in place of one."""
    random = np.random.default_rng(1)
    cut = [content[:length] for length in (0, 1, 35, 36, 37, 1000, len(content) - 1)]
    flipped = []
    for position in (0, 9, 24, 32, 36, *random.integers(36, len(content), 3).tolist()):
        changed = bytearray(content)
        changed[position] ^= 1 << int(random.integers(8))
        flipped.append(bytes(changed))
    zeros = [b"\0" * len(content), content[:36] + b"\0" * NUM_BYTES, content[:512] + b"\0" * 4524]
    return [*cut, *flipped, *zeros, content + b"\0", content * 2]


@pytest.mark.parametrize("number", range(20))
def test_damaged_files_are_refused(path, number):
    files = damaged(path.read_bytes())
    assert len(files) == 20
    path.write_bytes(files[number])
    with pytest.raises(page_file.UnusableFileError):
        read(path)


def test_a_file_of_another_key_or_another_name_is_foreign(path):
    with pytest.raises(page_file.UnusableFileError, match="something else"):
        read(path, key="other")
    for other in (path.with_name("0abce.bin"), path.parent.parent / "cd_g1" / path.name):
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(path.read_bytes())
        with pytest.raises(page_file.UnusableFileError, match="something else"):
            read(other)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a" / "b.bin")
    assert list((tmp_path / "a").iterdir()) == []


def test_the_bytes_are_synced_before_the_name_stands_for_them(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (order.append("sync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("rename"), replace(*a)))
    write(tmp_path / "b.bin")
    assert order == ["sync", "rename"]


WRITER = """
import sys, numpy as np
from vllm_metal.kv_store import page_file
for i in range(100000):
    path = f"{sys.argv[1]}/0ab/cd_g0/{i:06x}.bin"
    row = np.full(5000, i % 251, np.uint8)
    page_file.write(path, page_file.identity("k" * 64, path), row.data)
    if not i:
        print("begun", flush=True)
"""


@pytest.mark.nightly
def test_50_kills_at_random_moments_leave_whole_files_only(tmp_path):
    """Every file that has a name can be read; what is unfinished has none."""
    random, found = np.random.default_rng(2), 0
    for number in range(50):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", WRITER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in folder.rglob("*.bin"):
            assert read(path) == bytes([int(path.stem, 16) % 251]) * NUM_BYTES
            found += 1
    assert found > 50
