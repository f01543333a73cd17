"""Files in the background: counted, in order, and silent after the first failure."""

import logging
from pathlib import Path

import numpy as np
import pytest

from vllm_metal.kv_store import page_file
from vllm_metal.kv_store.file_threads import FileThreads

ROW = np.arange(200, dtype=np.uint8)


@pytest.fixture
def files():
    threads = FileThreads("key")
    yield threads
    threads.close()


def write(files: FileThreads, path: Path, is_wanted: bool = True) -> bool:
    files.write(0, str(path), ROW, lambda: is_wanted)
    return files.written.get(timeout=30)[1]


def read(files: FileThreads, path: Path) -> bytes | None:
    files.read(0, str(path), ROW.nbytes, lambda: True)
    return files.read_payloads.get(timeout=30)[1]


def test_a_block_comes_back(files, tmp_path):
    path = tmp_path / "a" / "b" / "c.bin"
    assert write(files, path)
    assert read(files, path) == ROW.tobytes()
    assert files.bytes_to_write == 0 and files.num_unusable == 0


def test_what_is_not_wanted_any_more_is_not_written(files, tmp_path):
    assert not write(files, tmp_path / "c.bin", is_wanted=False)
    assert not (tmp_path / "c.bin").exists()


def test_an_unusable_file_is_deleted_and_counted(files, tmp_path):
    path = tmp_path / "c.bin"
    write(files, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read(files, path) is None
    assert not path.exists() and files.num_unusable == 1


def test_a_full_disk_ends_writing_with_one_warning(files, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    write(files, tmp_path / "a.bin")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(logging.getLogger("vllm"), "propagate", True)
        patch.setattr(page_file, "write", full)
        assert not write(files, tmp_path / "b.bin")
        assert not write(files, tmp_path / "c.bin")
    warnings = [record for record in caplog.records if "No space left" in record.message]
    assert len({id(record) for record in warnings}) == 1
    assert not write(files, tmp_path / "d.bin")
    assert read(files, tmp_path / "a.bin") == ROW.tobytes()
    assert files.bytes_to_write == 0


def test_a_file_is_deleted_after_it_was_written(files, tmp_path):
    for number in range(20):
        files.write(0, str(tmp_path / f"{number}.bin"), ROW, lambda: True)
    for number in range(20):
        files.delete(str(tmp_path / f"{number}.bin"))
    files.close()
    assert list(tmp_path.glob("*.bin")) == []
