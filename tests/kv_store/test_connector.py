"""What vLLM loads by name: connector, spec, and the key on its way to the scheduler."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from vllm_metal.kv_store.connector import (
    DiskSpec,
    MetalKVConnector,
    StoreHandshake,
    handshake,
    make_transfers,
)
from vllm_metal.kv_store.folder_index import FolderIndex
from vllm_metal.kv_store.manager import BYTES_ON_DISK, METRICS, UNUSABLE, DiskManager


def test_vllm_finds_connector_and_spec(make_config, tmp_path):
    config = make_config(additional_config={"kv_store": str(tmp_path)})
    transfer = config.kv_transfer_config
    assert KVConnectorFactory.get_connector_class(transfer) is MetalKVConnector
    assert KVConnectorFactory.supports_hma_config(transfer)
    extra = transfer.kv_connector_extra_config
    assert OffloadingSpecFactory.get_spec_cls(extra) is DiskSpec
    assert DiskSpec.build_metric_definitions(extra) == METRICS


def test_figures_are_published(make_config, tmp_path):
    config = make_config(additional_config={"kv_store": str(tmp_path)})
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    published = MetalKVConnector.build_prom_metrics(config, types, ["engine"], {0: ["0"]})
    manager = DiskManager(FolderIndex(tmp_path, 1000))
    manager._counts[UNUSABLE] = 3
    published.observe(manager.get_stats().data)
    manager.shutdown()
    assert REGISTRY.get_sample_value(f"{UNUSABLE}_total", {"engine": "0"}) == 3
    assert REGISTRY.get_sample_value(BYTES_ON_DISK, {"engine": "0"}) == 0


def test_the_worker_moves_pages_by_itself():
    with pytest.raises(NotImplementedError):
        DiskSpec.get_worker(None, None)  # type: ignore[arg-type]


def test_the_scheduler_takes_the_key_of_the_worker(tmp_path):
    manager = DiskManager(FolderIndex(tmp_path, 1000))
    connector = MetalKVConnector.__new__(MetalKVConnector)
    connector.connector_scheduler = SimpleNamespace(manager=manager)
    told = handshake(SimpleNamespace(key="k", block_bytes=(5,)))
    assert told == {(0, 0): StoreHandshake("k", (5,))}
    connector.set_xfer_handshake_metadata_pp_aware(told)
    assert manager._files is not None and str(tmp_path) in manager._files.base_path
    manager.shutdown()


def test_nothing_is_moved_unless_asked(make_config):
    assert make_transfers(make_config(), None, {}) is None
    assert handshake(None) is None
