"""What vLLM loads by name where pages are kept on disk: a connector for its scheduler, and a spec.

vLLM's `OffloadingConnector` decides what is loaded and stored. It is used here in the scheduler
only: its half for the worker moves torch tensors, and here the worker moves MLX's pages by
`transfers.py`. The worker tells the scheduler the key of the files once the model is loaded, by
vLLM's exchange of metadata between the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)

from vllm_metal.kv_store import key
from vllm_metal.kv_store.folder_index import FolderIndex
from vllm_metal.kv_store.manager import METRICS, DiskManager
from vllm_metal.kv_store.transfers import PageTransfers
from vllm_metal.options import kv_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_metal.kv_cache.cache import KVCache


@dataclass
class StoreHandshake(KVConnectorHandshakeMetadata):
    """What the worker knows and the scheduler needs."""

    key: str
    """Digest of all that the bytes of a block depend on beside its tokens."""
    block_bytes: tuple[int, ...]
    """Bytes of a block of each group."""


class DiskSpec(OffloadingSpec):
    """Disk as the only tier: CPU and GPU share their memory, so a copy in memory gains nothing."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return dict(METRICS)

    def get_manager(self) -> DiskManager:
        settings = kv_store.of_extra_config(self.extra_config)
        return DiskManager(FolderIndex(settings.folder, settings.max_bytes))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Raises NotImplementedError: pages of MLX are moved by `transfers.py`."""
        raise NotImplementedError("the worker of vllm_metal moves pages by itself")


class MetalKVConnector(OffloadingConnector):
    """vLLM's connector with a `DiskManager`; for the scheduler only."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: Any):
        assert role is KVConnectorRole.SCHEDULER
        super().__init__(vllm_config, role, kv_cache_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        return None

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Takes the key from the worker."""
        [handshake] = metadata.values()
        assert isinstance(handshake, StoreHandshake)
        manager = self.scheduler.manager
        assert isinstance(manager, DiskManager)
        files = key.file_mapper(manager.index.folder, handshake.key)
        manager.start(files, handshake.block_bytes)


def make_transfers(
    vllm_config: "VllmConfig", kv_cache: "KVCache", of_server: Mapping[str, Any]
) -> PageTransfers | None:
    """The worker's half; None where no pages are kept on disk.

    Args:
        vllm_config: vLLM's configuration, checked and completed.
        kv_cache: the pages.
        of_server: what every result of this server depends on (`startup/dependencies.py`).
    """
    if kv_store.settings(vllm_config) is None:
        return None
    return PageTransfers(kv_cache, key.digest(vllm_config, kv_cache, of_server))


def handshake(transfers: PageTransfers | None) -> dict[tuple[int, int], StoreHandshake] | None:
    """What the worker tells the scheduler, in vLLM's form; None where there is nothing."""
    if transfers is None:
        return None
    return {(0, 0): StoreHandshake(transfers.key, transfers.block_bytes)}
