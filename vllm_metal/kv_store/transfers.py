"""The worker's half: moves bytes between MLX's pages and files, between two steps.

MLX's arrays are touched by the thread of the steps only, and only while no step is in flight: a
store reads pages that a step which has ended wrote, and a load writes pages that no step reads.
Files are read and written in the background (`file_threads.py`).

**Stores.** vLLM names the blocks that a step fills. They are copied when a later step begins, as
far as the copies that wait to be written leave room. vLLM promises that a block keeps its content
until its job is done, or until it says that the job must be flushed; then the rest is copied at
once.

**Loads.** Files are read in the background, a limited number of bytes ahead, and checked. When a
step begins, what was read is written to the pages. The request waits for its last block; others run
meanwhile. If any file is unusable it is deleted, vLLM is told that the load has failed, and it
schedules the request anew, with what is left on disk.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    DirectionalTransferStats,
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec
from vllm.v1.outputs import KVConnectorOutput

from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_store.file_threads import FileThreads
from vllm_metal.kv_store.manager import PageFiles

logger = logging.getLogger("vllm.metal.kv_store")

MOST_BYTES_WAITING = 256 << 20
"""Of copies that wait to be written, and of blocks that are read and not yet in pages."""

PIECE_BYTES = 32 << 20
"""Copied out of pages, or into them, at a time: what MLX needs beside the pages."""

MOST_BYTES_A_STEP = 64 << 20
"""Loaded before a step that computes tokens, so that its requests hardly notice."""


class _Block(NamedTuple):
    group: int
    block_id: int
    path: str


@dataclass
class _Job:
    number: int
    req_id: str
    todo: deque[_Block]
    started: float = field(default_factory=time.perf_counter)
    pending: int = 0
    """Blocks that a thread writes or reads, or has read and that are not in pages yet."""
    num_bytes: int = 0
    failed: bool = False

    @property
    def is_done(self) -> bool:
        return not self.todo and not self.pending

    def fail(self) -> None:
        """Gives a load up; what comes of it later must not reach pages."""
        self.failed = True
        self.todo.clear()


@dataclass
class Counts:
    """Since the start of the server."""

    blocks_written: int = 0
    bytes_written: int = 0
    blocks_not_written: int = 0
    blocks_read: int = 0
    bytes_read: int = 0


class Step(Protocol):
    """The part of vLLM's `SchedulerOutput` that is read here."""

    kv_connector_metadata: KVConnectorMetadata | None
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]


class PageTransfers:
    """Stores and loads of one worker.

    Args:
        kv_cache: the pages.
        key: digest of what the bytes depend on beside the tokens (`key.py`).
    """

    def __init__(self, kv_cache: KVCache, key: str):
        self.key = key
        self.counts = Counts()
        self.block_bytes = tuple(kv_cache.block_bytes(i) for i in range(len(kv_cache.groups)))
        self._kv_cache = kv_cache
        self._files: FileThreads[tuple[_Job, _Block]] = FileThreads(key)
        self._bytes_read_ahead = 0
        self._stores: dict[int, _Job] = {}
        self._loads: dict[int, _Job] = {}
        self._with_nans: set[str] = set()
        self._paths_of_request: dict[str, list[str]] = {}
        self._done = OffloadingWorkerMetadata()
        self._output = KVConnectorOutput(finished_sending=set(), finished_recving=set())

    def begin_step(self, step: Step, finish_steps: Callable[[], None]) -> KVConnectorOutput | None:
        """Moves what is to be moved before a step, and takes the step's jobs.

        Args:
            step: output of vLLM's scheduler.
            finish_steps: waits for the steps in flight; called before pages are touched.

        Returns:
            What vLLM's scheduler is told with this step; None where that is nothing.
        """
        metadata = step.kv_connector_metadata
        if metadata is None:
            return None
        assert isinstance(metadata, OffloadingConnectorMetadata)
        flushed = metadata.jobs_to_flush or set()
        new_stores = {n: _job(n, job, job.src_spec) for n, job in metadata.store_jobs.items()}
        self._stores |= {n: job for n, job in new_stores.items() if n in flushed}
        self._drop_nans()
        for number in flushed & self._loads.keys():
            self._loads[number].fail()  # its blocks go to others
        if self._has_work():
            finish_steps()
            for number, job in self._stores.items():
                self._copy_out(job, everything=number in flushed)
            self._fill_pages(MOST_BYTES_A_STEP if step.total_num_scheduled_tokens else None)
        self._stores |= new_stores
        for number, transfer in metadata.load_jobs.items():
            self._loads[number] = _job(number, transfer, transfer.dst_spec)
        self._read_ahead()
        self._collect()
        for req_id in step.finished_req_ids:
            self._paths_of_request.pop(req_id, None)
        return self._take_output()

    def discard(self, req_ids: Sequence[str]) -> None:
        """Keeps nothing of requests whose logits are not finite; any thread may call it."""
        self._with_nans.update(req_ids)

    def close(self) -> None:
        """Writes what is to be written, and logs what was done. No step may be in flight."""
        self._drop_nans()
        for job in self._stores.values():
            self._copy_out(job, everything=True)
        self._files.close()
        self._collect()
        counts = self.counts
        logger.info(
            "KV store: wrote %d blocks (%.3f GiB), read %d (%.3f GiB); %d blocks not written, "
            "%d files unusable",
            counts.blocks_written,
            counts.bytes_written / (1 << 30),
            counts.blocks_read,
            counts.bytes_read / (1 << 30),
            counts.blocks_not_written,
            self._files.num_unusable,
        )

    def _has_work(self) -> bool:
        waiting = any(job.todo for job in self._stores.values())
        return waiting or not self._files.read_payloads.empty()

    def _copy_out(self, job: _Job, everything: bool = False) -> None:
        """Copies a job's blocks for the writer, a piece at a time while there is room."""
        while job.todo and (everything or self._files.bytes_to_write < MOST_BYTES_WAITING):
            if self._files.write_error is not None:
                self.counts.blocks_not_written += len(job.todo)
                job.todo.clear()
                return
            piece = [job.todo.popleft()]
            group = piece[0].group
            most = max(1, PIECE_BYTES // self.block_bytes[group])
            while job.todo and job.todo[0].group == group and len(piece) < most:
                piece.append(job.todo.popleft())
            content = self._kv_cache.read_blocks(group, [block.block_id for block in piece])
            job.pending += len(piece)
            for block, row in zip(piece, content, strict=True):
                self._files.write((job, block), block.path, row, partial(self._is_wanted, job))

    def _is_wanted(self, job: _Job) -> bool:
        return job.req_id not in self._with_nans

    def _fill_pages(self, most_bytes: int | None) -> None:
        """Writes what was read to the pages, up to a number of bytes."""
        before, payloads = self.counts.bytes_read, self._files.read_payloads
        while not payloads.empty() and (
            most_bytes is None or self.counts.bytes_read - before < most_bytes
        ):
            piece: list[tuple[_Block, bytes]] = []
            piece_bytes = 0
            while not payloads.empty() and piece_bytes < PIECE_BYTES:
                (job, block), payload = payloads.get()
                job.pending -= 1
                self._bytes_read_ahead -= self.block_bytes[block.group]
                if payload is None:
                    job.fail()
                elif not job.failed:
                    piece.append((block, payload))
                    piece_bytes += len(payload)
                    job.num_bytes += len(payload)
            self._write_pages(piece)
            self.counts.blocks_read += len(piece)
            self.counts.bytes_read += piece_bytes

    def _write_pages(self, piece: list[tuple[_Block, bytes]]) -> None:
        piece.sort(key=lambda item: item[0].group)
        for group, items in groupby(piece, key=lambda item: item[0].group):
            blocks, payloads = zip(*items, strict=True)
            content = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(blocks), -1)
            self._kv_cache.write_blocks(group, [b.block_id for b in blocks], content)

    def _drop_nans(self) -> None:
        for job in self._stores.values():
            if not self._is_wanted(job):
                job.todo.clear()
        for req_id in self._with_nans & self._paths_of_request.keys():
            for path in self._paths_of_request.pop(req_id):
                self._files.delete(path)

    def _read_ahead(self) -> None:
        for job in self._loads.values():
            while job.todo and self._bytes_read_ahead < MOST_BYTES_WAITING:
                block = job.todo.popleft()
                size = self.block_bytes[block.group]
                job.pending += 1
                self._bytes_read_ahead += size
                self._files.read((job, block), block.path, size, partial(_is_going_on, job))

    def _collect(self) -> None:
        """Finds the jobs that are done."""
        while not self._files.written.empty():
            (job, block), success = self._files.written.get()
            job.pending -= 1
            if success:
                size = self.block_bytes[block.group]
                job.num_bytes += size
                self.counts.blocks_written += 1
                self.counts.bytes_written += size
                self._paths_of_request.setdefault(job.req_id, []).append(block.path)
            else:
                self.counts.blocks_not_written += 1
        statistics, received = self._done.transfer_stats, self._output.finished_recving
        assert received is not None
        for job in [job for job in self._stores.values() if job.is_done]:
            self._complete(self._stores.pop(job.number), statistics.store)
        for job in [job for job in self._loads.values() if job.is_done]:
            self._complete(self._loads.pop(job.number), statistics.load)
            received.add(job.req_id)
            if job.failed:
                self._output.failed_recving.add(job.req_id)

    def _complete(self, job: _Job, statistics: DirectionalTransferStats) -> None:
        self._done.mark_completed(job.number)
        if job.num_bytes:
            statistics.record(job.num_bytes, time.perf_counter() - job.started)

    def _take_output(self) -> KVConnectorOutput | None:
        output = self._output
        if self._done.completed_jobs:
            output.kv_connector_worker_meta = self._done
            self._done = OffloadingWorkerMetadata()
        self._output = KVConnectorOutput(finished_sending=set(), finished_recving=set())
        return None if output.is_empty() else output


def _is_going_on(job: _Job) -> bool:
    return not job.failed


def _job(number: int, transfer: TransferJob, pages: LoadStoreSpec) -> _Job:
    """A job of vLLM's, with a file for each block. `pages` is its source or its destination."""
    files = transfer.dst_spec if pages is transfer.src_spec else transfer.src_spec
    assert isinstance(pages, GPULoadStoreSpec) and isinstance(files, PageFiles)
    groups = np.repeat(np.arange(len(pages.group_sizes)), pages.group_sizes).tolist()
    blocks = zip(groups, pages.block_ids.tolist(), files.paths, strict=True)
    return _Job(number, transfer.req_id, deque(_Block(*block) for block in blocks))
