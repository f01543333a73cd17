"""The figures at `/metrics` are the start-up report's."""

from importlib.metadata import entry_points

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_checkpoint
from vllm_metal.metrics import GAUGES, KVCacheMetrics, summarise


@pytest.fixture(scope="module")
def config(tmp_path_factory, demo_model):
    folder = save_checkpoint(
        tmp_path_factory.mktemp("model") / "llama",
        head_dim=64,
        num_key_value_heads=2,
        num_hidden_layers=3,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return EngineArgs(
        str(folder),
        dtype="float32",
        max_model_len=64,
        additional_config={"turboquant": True, "skip_layers": [0]},
    ).create_engine_config()


def test_summary_of_a_cache_with_one_dense_layer(config):
    summary = summarise(config)
    assert (summary.num_layers, summary.num_compressed) == (3, 2)
    assert summary.bytes_per_token == 2 * 128 * 4 + 2 * (2 * 92)


def test_gauges_are_published(config):
    KVCacheMetrics(config).log_engine_initialized()
    summary = summarise(config)
    labels = {"model_name": str(config.model_config.served_model_name)}
    for name in GAUGES:
        value = REGISTRY.get_sample_value(f"vllm_metal:kv_cache_{name}", labels)
        assert value == pytest.approx(getattr(summary, name)), name


def test_vllm_finds_the_logger():
    (entry,) = entry_points(group="vllm.stat_logger_plugins", name="metal_kv_cache")
    assert entry.load() is KVCacheMetrics
