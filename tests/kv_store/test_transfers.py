"""Bytes between pages and files: right ones, in the right pages, and only between steps."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from vllm_metal.attention.backend import LayerShape
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import AttentionGroup, CacheLayout, Region
from vllm_metal.kv_store import transfers
from vllm_metal.kv_store.manager import PageFiles
from vllm_metal.kv_store.transfers import PageTransfers
from vllm_metal.metal_kernel_backend.dense.reference import DensePages

BLOCK = 16
NUM_BLOCKS = 12
SHAPE = LayerShape(num_kv_heads=1, head_size=8, head_size_v=8)


def cache_of(dtype: mx.Dtype = mx.bfloat16) -> KVCache:
    """Two groups of two layers over two regions, as with windows."""
    backends = [DensePages(SHAPE, BLOCK, dtype) for _ in range(4)]
    size = backends[0].page_size_bytes
    layout = CacheLayout(
        (AttentionGroup(BLOCK, (0, 2)), AttentionGroup(BLOCK, (1, 3), 32)),
        (Region(size, layers=(0, 1)), Region(size, layers=(2, 3))),
    )
    return KVCache(backends, NUM_BLOCKS, layout=layout)


def pages_of(cache: KVCache) -> np.ndarray:
    """All bytes, [blocks, bytes]."""
    return cache.read_blocks(0, range(NUM_BLOCKS))


def filled(seed: int, dtype: mx.Dtype = mx.bfloat16) -> KVCache:
    cache = cache_of(dtype)
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, (NUM_BLOCKS, cache.block_bytes(0)), np.uint8)
    cache.write_blocks(0, range(NUM_BLOCKS), content)
    np.testing.assert_array_equal(pages_of(cache), content)
    return cache


class Server:
    """The worker's half with a scheduler of the test's own."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.transfers = PageTransfers(cache, "key")
        self.finished = 0
        self.completed: set[int] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()

    def step(self, stores=(), loads=(), flush=(), tokens=0, ended=()) -> None:
        metadata = OffloadingConnectorMetadata(dict(loads), dict(stores), set(flush))
        step = SimpleNamespace(
            kv_connector_metadata=metadata,
            total_num_scheduled_tokens=tokens,
            finished_req_ids=set(ended),
        )

        def finish() -> None:
            self.finished += 1

        output = self.transfers.begin_step(step, finish)
        if output is not None:
            self.received |= output.finished_recving
            self.failed |= output.failed_recving
            if output.kv_connector_worker_meta:
                self.completed |= output.kv_connector_worker_meta.completed_jobs.keys()

    def until(self, job: int) -> None:
        for _ in range(20000):
            self.step()
            if job in self.completed:
                return
        raise AssertionError(f"job {job} does not end")


@pytest.fixture
def serve():
    servers = []

    def serve(cache: KVCache) -> Server:
        servers.append(Server(cache))
        return servers[-1]

    yield serve
    for server in servers:
        server.transfers.close()


def blocks_of(groups: dict[int, list[int]]) -> GPULoadStoreSpec:
    sizes = [len(groups.get(g, [])) for g in range(2)]
    return GPULoadStoreSpec([b for g in range(2) for b in groups.get(g, [])], sizes, [0, 0])


def files_of(folder: Path, groups: dict[int, list[int]]) -> PageFiles:
    return PageFiles(
        [str(folder / "0ab" / f"cd_g{g}" / f"{i:04x}.bin") for g in groups for i in groups[g]]
    )


def store(folder: Path, files: dict[int, list[int]], blocks: dict[int, list[int]], req="a"):
    return TransferJob(req, blocks_of(blocks), files_of(folder, files))


def load(folder: Path, files: dict[int, list[int]], blocks: dict[int, list[int]], req="b"):
    return TransferJob(req, files_of(folder, files), blocks_of(blocks))


FILES = {0: [0, 1, 2], 1: [1, 2]}
SOURCES = {0: [3, 7, 4], 1: [9, 2]}
TARGETS = {0: [1, 2, 10], 1: [5, 11]}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_blocks_come_back_in_another_process(serve, tmp_path, monkeypatch, dtype, piece_bytes):
    monkeypatch.setattr(transfers, "PIECE_BYTES", piece_bytes)
    first = serve(filled(1, dtype))
    first.step(stores={1: store(tmp_path, FILES, SOURCES)}, tokens=5)
    first.until(1)
    second = serve(filled(2, dtype))
    expected = pages_of(second.cache)
    for group, targets in TARGETS.items():
        expected[targets] = pages_of(first.cache)[SOURCES[group]]
    second.step(loads={1: load(tmp_path, FILES, TARGETS)})
    second.until(1)
    assert second.received == {"b"} and not second.failed
    np.testing.assert_array_equal(pages_of(second.cache), expected)
    assert second.transfers.counts.blocks_read == 5
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.bin")]
    assert len(sizes) == 5
    assert sum(sizes) == first.transfers.counts.bytes_written + 5 * 36


def test_a_store_reads_pages_when_the_step_that_fills_them_has_ended(serve, tmp_path):
    """The pages of a job change until the next step begins."""
    server = serve(filled(1))
    server.step(stores={1: store(tmp_path, {0: [0]}, {0: [3]})}, tokens=5)
    assert server.finished == 0
    written = np.full((1, server.cache.block_bytes(0)), 7, np.uint8)
    server.cache.write_blocks(0, [3], written)
    server.step(tokens=1)
    assert server.finished == 1
    server.until(1)
    [path] = tmp_path.rglob("*.bin")
    assert path.read_bytes()[36:] == written.tobytes()


def test_a_step_without_jobs_waits_for_nothing(serve):
    server = serve(filled(1))
    server.step(tokens=5)
    server.step()
    assert server.finished == 0


def check_kept(server, folder: Path, expected: bytes) -> None:
    """Job 1 writes what block 3 had, though its page is another's by now."""
    server.cache.write_blocks(0, [3], np.zeros((1, server.cache.block_bytes(0)), np.uint8))
    server.until(1)
    [path] = folder.rglob("*.bin")
    assert path.read_bytes()[36:] == expected


def test_blocks_wait_in_their_pages_until_there_is_room(serve, tmp_path, monkeypatch):
    """And are copied at once when vLLM is to give them to others."""
    monkeypatch.setattr(transfers, "MOST_BYTES_WAITING", 0)
    server = serve(filled(1))
    expected = pages_of(server.cache)[3].tobytes()
    server.step(stores={1: store(tmp_path, {0: [0]}, {0: [3]})}, tokens=5)
    for _ in range(3):
        server.step(tokens=1)
    assert 1 not in server.completed
    server.step(flush=[1], tokens=1)
    check_kept(server, tmp_path, expected)


def test_a_job_that_is_flushed_in_its_own_step_is_copied_at_once(serve, tmp_path):
    server = serve(filled(1))
    expected = pages_of(server.cache)[3].tobytes()
    server.step(stores={1: store(tmp_path, {0: [0]}, {0: [3]})}, flush=[1], tokens=5)
    check_kept(server, tmp_path, expected)


def test_a_load_with_an_unusable_file_fails_and_leaves_the_other_pages_alone(serve, tmp_path):
    first = serve(filled(1))
    first.step(stores={1: store(tmp_path, FILES, SOURCES)}, tokens=5)
    first.until(1)
    damaged = Path(files_of(tmp_path, FILES).paths[1])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    second = serve(filled(2))
    before = pages_of(second.cache)
    second.step(loads={1: load(tmp_path, FILES, TARGETS)})
    second.until(1)
    assert second.received == second.failed == {"b"}
    others = [b for b in range(NUM_BLOCKS) if b not in [*TARGETS[0], *TARGETS[1]]]
    np.testing.assert_array_equal(pages_of(second.cache)[others], before[others])
    np.testing.assert_array_equal(pages_of(second.cache)[2], before[2])
    assert not damaged.exists()


def test_a_load_that_is_given_up_writes_no_more_pages(serve, tmp_path):
    first = serve(filled(1))
    first.step(stores={1: store(tmp_path, FILES, SOURCES)}, tokens=5)
    first.until(1)
    second = serve(filled(2))
    before = pages_of(second.cache)
    second.step(loads={1: load(tmp_path, FILES, TARGETS)})
    second.step(flush=[1])
    second.until(1)
    np.testing.assert_array_equal(pages_of(second.cache), before)


def test_a_step_with_tokens_loads_a_part(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "MOST_BYTES_A_STEP", 1)
    monkeypatch.setattr(transfers, "PIECE_BYTES", 1)
    first = serve(filled(1))
    first.step(stores={1: store(tmp_path, FILES, SOURCES)}, tokens=5)
    first.until(1)
    second = serve(filled(2))
    second.step(loads={1: load(tmp_path, FILES, TARGETS)}, tokens=1)
    second.transfers._files._readers.shutdown()  # all that was asked for is read now
    for done in range(1, 5):
        second.step(tokens=1)
        assert second.transfers.counts.blocks_read == done
        assert not second.received
    second.step(tokens=1)
    assert second.received == {"b"}


def test_nothing_is_kept_of_a_request_whose_logits_are_not_finite(serve, tmp_path):
    """Neither what is written already, nor what is still to be written."""
    server = serve(filled(1))
    server.step(stores={1: store(tmp_path, {0: [0]}, {0: [3]}, "nan")}, tokens=5)
    server.until(1)
    assert len(list(tmp_path.rglob("*.bin"))) == 1
    stores = {2: store(tmp_path, {0: [1]}, {0: [4]}, "nan"), 3: store(tmp_path, {0: [2]}, {0: [5]})}
    server.step(stores=stores, tokens=5)
    server.transfers.discard(["nan"])
    server.until(2)
    server.until(3)
    server.transfers.close()
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["0002.bin"]


def test_what_waits_is_written_on_stop(serve, tmp_path):
    server = serve(filled(1))
    server.step(stores={1: store(tmp_path, FILES, SOURCES)}, tokens=5)
    server.transfers.close()
    assert len(list(tmp_path.rglob("*.bin"))) == 5
    assert server.transfers.counts.blocks_written == 5


def test_jobs_end_where_nothing_can_be_written(serve, tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(transfers, "PIECE_BYTES", 1)
    monkeypatch.setattr("vllm_metal.kv_store.page_file.write", read_only)
    server = serve(filled(1))
    for job in (1, 2):
        server.step(stores={job: store(tmp_path, FILES, SOURCES)}, tokens=5)
        server.until(job)
    assert server.transfers.counts.blocks_not_written == 10
