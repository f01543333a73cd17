"""What vLLM's scheduler is told about the files."""

from pathlib import Path

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_metal.kv_store import manager as names
from vllm_metal.kv_store.folder_index import FolderIndex
from vllm_metal.kv_store.key import file_mapper
from vllm_metal.kv_store.manager import DiskManager

KEYS = [make_offload_key(bytes([i]) * 32, group_idx=i % 2) for i in range(6)]
BLOCK_BYTES = (64, 164)
FILE_BYTES = (100, 200)
CONTEXT = ReqContext(req_id="a")


@pytest.fixture
def make(tmp_path):
    made = []

    def make(max_bytes: int = 10000, key: str = "key") -> DiskManager:
        manager = DiskManager(FolderIndex(tmp_path, max_bytes))
        manager.start(file_mapper(tmp_path, key), BLOCK_BYTES)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        manager.shutdown()


def write(manager: DiskManager, keys) -> list[Path]:
    """As the worker does with a job of these keys."""
    output = manager.prepare_store(keys, CONTEXT)
    paths = [Path(path) for path in output.store_spec.paths]
    for path, key in zip(paths, output.keys_to_store, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(FILE_BYTES[KEYS.index(key) % 2]))
    manager.complete_store(output.keys_to_store, CONTEXT)
    return paths


def is_found(manager: DiskManager, key) -> bool:
    return manager.lookup(key, CONTEXT) is LookupResult.HIT


def counted(manager: DiskManager, name: str) -> int:
    stats = manager.get_stats()
    return stats.reduce().get(name, 0) if stats else 0


def test_a_block_is_found_once_it_is_written(make):
    manager = make()
    assert not is_found(manager, KEYS[0])
    output = manager.prepare_store(KEYS[:1], CONTEXT)
    assert not is_found(manager, KEYS[0])
    manager.complete_store(output.keys_to_store, CONTEXT)
    assert not is_found(manager, KEYS[0])  # its file could not be written
    assert counted(manager, names.UNWRITTEN) == 1
    write(manager, KEYS[:1])
    assert is_found(manager, KEYS[0])
    assert manager.get_load_source(KEYS[0], CONTEXT) is CacheHitSource.DISK
    assert is_found(make(), KEYS[0])


def test_another_key_finds_nothing(make, caplog):
    write(make(), KEYS)
    with caplog.at_level("INFO", logger="vllm.metal.kv_store"):
        other = make(key="other")
    assert not any(is_found(other, key) for key in KEYS)
    assert [r for r in caplog.messages if "0 blocks of this model and these settings, 6" in r]


def test_before_the_worker_has_said_its_key_nothing_is_found_or_stored(tmp_path, make):
    write(make(), KEYS)
    manager = DiskManager(FolderIndex(tmp_path, 1000))
    assert not is_found(manager, KEYS[0])
    assert manager.prepare_store(KEYS, CONTEXT).keys_to_store == []
    manager.shutdown()


def test_nothing_is_written_twice(make):
    manager = make()
    assert manager.prepare_store(KEYS[:2], CONTEXT).keys_to_store == KEYS[:2]
    assert manager.prepare_store(KEYS[:3], CONTEXT).keys_to_store == [KEYS[2]]
    write(make(), [KEYS[4]])  # by another server
    assert manager.prepare_store(KEYS[3:], CONTEXT).keys_to_store == [KEYS[3], KEYS[5]]


def test_a_file_that_the_worker_found_unusable_is_a_miss(make):
    manager = make()
    paths = write(manager, KEYS[:2])
    spec = manager.prepare_load(KEYS[:2], CONTEXT)
    assert spec.paths == [str(path) for path in paths]
    paths[0].unlink()
    manager.complete_load(KEYS[:2], CONTEXT)
    assert [is_found(manager, key) for key in KEYS[:2]] == [False, True]
    assert counted(manager, names.UNUSABLE) == 1


def test_the_limit_holds(make):
    manager = make(max_bytes=450)
    write(manager, KEYS[:2])
    write(manager, KEYS[2:4])
    assert manager.index.num_bytes <= 450
    assert [is_found(manager, key) for key in KEYS[:4]] == [False, False, True, True]
    assert counted(manager, names.EVICTED) == 2
    assert counted(manager, names.EVICTED) == 0  # counted once


def test_the_first_blocks_of_a_request_go_last(make):
    """Without the first block of a prefix the others cannot be found."""
    manager = make(max_bytes=450)
    context = ReqContext(req_id="b")
    for position, key in enumerate(KEYS[:3]):
        context.set_offload_key_position(key, 16 * (position + 1))
    write(manager, KEYS[:3])
    manager.on_request_finished(context)
    manager.index.make_room(300)
    assert [is_found(manager, key) for key in KEYS[:3]] == [True, False, False]


def test_a_reset_deletes_the_files_of_these_settings(make):
    own, other = make(), make(key="other")
    write(own, KEYS)
    kept = write(other, KEYS)
    own.index.add(str(kept[0]))
    own.reset_cache()
    assert not any(is_found(own, key) for key in KEYS)
    assert all(path.exists() for path in kept)
