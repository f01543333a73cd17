"""Which files there are, which goes first, and what is left alone."""

import os
import time
from pathlib import Path

import pytest

from vllm_metal.kv_store import folder_index
from vllm_metal.kv_store.folder_index import FolderIndex
from vllm_metal.kv_store.key import file_mapper

SIZE = 100
LIMIT = 5 * SIZE


def path_of(folder: Path, number: int, key: str = "key") -> Path:
    """As vLLM names it."""
    hashed = bytes([number]) * 32 + bytes(4)
    return Path(file_mapper(folder, key).get_file_name(hashed))


def put(folder: Path, number: int, age_s: float = 0, key: str = "key") -> str:
    path = path_of(folder, number, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(SIZE))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return str(path)


@pytest.fixture
def make(tmp_path):
    made = []

    def make() -> FolderIndex:
        made.append(FolderIndex(tmp_path, LIMIT))
        return made[-1]

    yield make
    for index in made:
        index.close()


def test_the_order_of_use_survives_a_restart(make, tmp_path):
    old, new, middle = put(tmp_path, 1, 9000), put(tmp_path, 2, 1000), put(tmp_path, 3, 5000)
    index = make()
    assert index.paths() == [old, middle, new]
    assert index.num_bytes == 3 * SIZE
    index.touch([old])
    index.close()
    assert make().paths() == [middle, new, old]


def test_the_least_recently_used_make_room(make, tmp_path):
    paths = [put(tmp_path, i, 1000 - i) for i in range(5)]
    index = make()
    index.touch([paths[0]])
    assert index.make_room(2 * SIZE)
    assert index.paths() == [paths[3], paths[4], paths[0]]
    assert [Path(p).exists() for p in paths] == [True, False, False, True, True]
    assert index.num_evicted == 2


def test_files_of_other_settings_count_and_make_room_too(make, tmp_path):
    other, own = put(tmp_path, 1, 500, key="other"), put(tmp_path, 1, 100)
    index = make()
    assert index.num_bytes == 2 * SIZE
    assert index.make_room(4 * SIZE)
    assert not Path(other).exists() and Path(own).exists()


def test_files_that_are_loaded_stay(make, tmp_path):
    paths = [put(tmp_path, i, 1000 - i) for i in range(5)]
    index = make()
    index.hold(paths)
    assert not index.make_room(SIZE)
    index.release(paths)
    assert index.make_room(SIZE)


def test_what_is_larger_than_the_limit_evicts_nothing(make, tmp_path):
    path = put(tmp_path, 1)
    assert not make().make_room(LIMIT + 1)
    assert Path(path).exists()


def test_files_of_other_servers_are_found(make, tmp_path):
    index = make()
    path = put(tmp_path, 1)
    assert path in index
    os.unlink(path)
    assert index.add(path) is False
    assert path not in index and index.num_bytes == 0


def test_a_scan_counts_what_other_servers_write_and_delete(make, tmp_path):
    gone = put(tmp_path, 1, 9000)
    index = make()
    own = put(tmp_path, 2)
    index.add(own)
    foreign = put(tmp_path, 3, 5000)
    os.unlink(gone)
    index.make_room(0)  # starts a scan: a sixteenth of the limit was written
    index._scan.result()
    index.make_room(0)
    assert index.paths() == [foreign, own]


def test_nothing_of_the_users_own_is_touched(make, tmp_path):
    """The folder may hold anything else, also with names that end alike."""
    own = [
        tmp_path / "a.bin",
        tmp_path / "model" / "ab" / "pytorch_model.bin",
        tmp_path / "model" / "0ab" / "cd_g0" / "0abcd.bin",
    ]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(SIZE))
    put(tmp_path, 1)
    index = make()
    assert index.num_bytes == SIZE
    index.make_room(LIMIT)
    assert all(path.exists() for path in own)


def test_what_a_killed_process_left_is_deleted(make, tmp_path):
    path = Path(put(tmp_path, 1))
    left, writing = path.with_name(".unfinished-a"), path.with_name(".unfinished-b")
    left.write_bytes(b"1")
    writing.write_bytes(b"1")
    then = time.time() - folder_index.ABANDONED_S - 10
    os.utime(left, (then, then))
    assert make().paths() == [str(path)]
    assert not left.exists() and writing.exists()


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    index = FolderIndex(tmp_path / "none", LIMIT)
    assert index.paths() == [] and index.make_room(1)
    index.close()
