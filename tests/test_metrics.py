"""The figures at `/metrics` are the start-up report's."""

from importlib.metadata import entry_points

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs

from tests.serving import Serving
from tests.tiny_models import save_checkpoint, save_tokenizer
from vllm_metal.kv_cache.planner import report
from vllm_metal.metrics import GAUGES, KVCacheMetrics, figures


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
    found = figures(config)
    assert (found["num_layers"], found["num_compressed"]) == (3, 2)
    assert found["bytes_per_token"] == 2 * 128 * 4 + 2 * (2 * 92)
    assert found["ratio"] == found["dense_bytes_per_token"] / found["bytes_per_token"]


def test_gauges_are_published(config):
    KVCacheMetrics(config).log_engine_initialized()
    found = figures(config)
    assert found.keys() == GAUGES.keys()
    labels = {"model_name": str(config.model_config.served_model_name)}
    for name in GAUGES:
        value = REGISTRY.get_sample_value(f"vllm_metal:kv_cache_{name}", labels)
        assert value == pytest.approx(found[name]), name


def test_the_ratio_of_a_hybrid_counts_its_states(tmp_path, make_config):
    """The figure that the start-up report prints, and less than that of the attention layers."""
    folder = save_checkpoint(tmp_path / "jamba", "jamba", head_dim=64)
    save_tokenizer(folder)
    config = make_config(
        model=str(folder),
        runner="generate",
        skip_tokenizer_init=False,
        additional_config={"turboquant": True},
    )
    found = figures(config)
    serving = Serving(config)
    cache, kv_cache = serving.worker.model_pages, serving.worker.kv_cache
    text = report(
        serving.worker.plan,
        [],
        cache.summary,
        cache.capacity(kv_cache.nbytes, 128),
        cache.dense_capacity(kv_cache.nbytes, 128),
        128,
    )
    assert f"{found['ratio']:.2f}x over the whole cache" in text
    assert found["ratio"] < found["dense_bytes_per_token"] / found["bytes_per_token"]


def test_vllm_finds_the_logger():
    (entry,) = entry_points(group="vllm.stat_logger_plugins", name="metal_kv_cache")
    assert entry.load() is KVCacheMetrics
