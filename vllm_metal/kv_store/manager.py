"""The scheduler's half: which blocks are on disk, which are to be written, which are evicted.

vLLM's `OffloadingConnectorScheduler` asks, once a step and never from two threads. It hands jobs to
the worker's half (`transfers.py`), which moves the bytes. vLLM counts every job as a success; what
is true is on disk. So when a job is done, each of its files is looked for: a file that is missing
after a store was not written, and one that is missing after a load was unusable and is deleted.
"""

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_metal.kv_store.folder_index import FolderIndex
from vllm_metal.kv_store.page_file import file_bytes

logger = logging.getLogger("vllm.metal.kv_store")

BYTES_ON_DISK = "vllm_metal:kv_store_bytes"
EVICTED = "vllm_metal:kv_store_evicted_files"
UNUSABLE = "vllm_metal:kv_store_unusable_files"
UNWRITTEN = "vllm_metal:kv_store_unwritten_blocks"

METRICS = {
    BYTES_ON_DISK: OffloadingGaugeMetadata("Bytes of the files in the folder of kv_store."),
    EVICTED: OffloadingCounterMetadata("Files of kv_store deleted because of kv_store_gib."),
    UNUSABLE: OffloadingCounterMetadata(
        "Files of kv_store that were damaged, foreign or gone when they were to be loaded."
    ),
    UNWRITTEN: OffloadingCounterMetadata("Blocks that could not be written to kv_store."),
}


@dataclass
class PageFiles(LoadStoreSpec):
    """Paths of files, one for each block of a job, in its order."""

    paths: list[str]


class DiskManager(OffloadingManager):
    """Keeps blocks on disk, one file each. It finds none until `start`.

    Args:
        index: the files in the folder.
    """

    def __init__(self, index: FolderIndex):
        self.index = index
        self._files: FileMapper | None = None
        self._block_bytes: tuple[int, ...] = ()
        self._writing: set[str] = set()
        self._counts = dict.fromkeys((EVICTED, UNUSABLE, UNWRITTEN), 0)
        self._evicted_before = 0
        self._bytes_told = 0

    def start(self, files: FileMapper, block_bytes: tuple[int, ...]) -> None:
        """Tells what only the worker knows.

        Args:
            files: names of files, which hold the key of this model and these settings.
            block_bytes: of a block of each group.
        """
        self._files = files
        self._block_bytes = block_bytes
        paths = self.index.paths()
        usable = sum(path.startswith(files.base_path) for path in paths)
        logger.info(
            "KV store %s: %d blocks of this model and these settings, %d of others; %.2f of %.0f "
            "GiB",
            self.index.folder,
            usable,
            len(paths) - usable,
            self.index.num_bytes / (1 << 30),
            self.index.max_bytes / (1 << 30),
        )

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        path = self._path(key)
        if path is None or path in self._writing or path not in self.index:
            return LookupResult.MISS
        return LookupResult.HIT

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        return CacheHitSource.DISK

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PageFiles:
        paths = self._paths(keys)
        self.index.hold(paths)
        return PageFiles(paths)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        paths = self._paths(keys)
        self.index.release(paths)
        for path in paths:
            if not os.path.exists(path):
                self.index.drop(path)
                self._counts[UNUSABLE] += 1

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        chosen, paths, num_bytes = [], [], 0
        for key in keys:
            path = self._path(key)
            if path is None or path in self._writing or path in self.index:
                continue
            size = file_bytes(self._block_bytes[get_offload_group_idx(key)])
            if not self.index.make_room(num_bytes + size):
                break
            num_bytes += size
            chosen.append(key)
            paths.append(path)
        self._writing.update(paths)
        return PrepareStoreOutput(chosen, PageFiles(paths), evicted_keys=[])

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        for path in self._paths(keys):
            self._writing.discard(path)
            if not self.index.add(path):
                self._counts[UNWRITTEN] += 1

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Its first blocks were used last: without them the others cannot be found."""
        self.index.touch(reversed(self._paths(req_context._offload_key_positions)))

    def reset_cache(self) -> None:
        """Deletes the files of this model and these settings."""
        self._writing.clear()
        if self._files is not None:
            for path in self.index.paths():
                if path.startswith(self._files.base_path):
                    self.index.remove(path)

    def get_stats(self) -> OffloadingConnectorStats | None:
        self._counts[EVICTED] = self.index.num_evicted - self._evicted_before
        self._evicted_before = self.index.num_evicted
        if not any(self._counts.values()) and self.index.num_bytes == self._bytes_told:
            return None
        self._bytes_told = self.index.num_bytes
        stats = OffloadingConnectorStats()
        stats.set_gauge(BYTES_ON_DISK, self.index.num_bytes)
        for name, count in self._counts.items():
            if count:
                stats.increase_counter(name, count)
                self._counts[name] = 0
        return stats

    def shutdown(self) -> None:
        self.index.close()

    def _path(self, key: OffloadKey) -> str | None:
        return None if self._files is None else self._files.get_file_name(key)

    def _paths(self, keys: Iterable[OffloadKey]) -> list[str]:
        return [path for key in keys if (path := self._path(key)) is not None]
