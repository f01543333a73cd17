"""What a second start reads from the startup cache, and what it measures again."""

import json

import pytest

from tests.serving import loaded_worker
from tests.tiny_models import save_checkpoint, save_tokenizer
from vllm_metal import worker as worker_module
from vllm_metal.machine.cache_folder import STARTUP_CACHE_VARIABLE
from vllm_metal.startup import compression
from vllm_metal.worker import MetalWorker


@pytest.fixture
def make_compressed(make_config, tmp_path, monkeypatch):
    """As `make_config`, for a model that can be compressed, with an empty startup cache."""
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_checkpoint(tmp_path / "model", head_dim=64)
    save_tokenizer(folder)

    def make(**settings):
        defaults = {"model": str(folder), "skip_tokenizer_init": False}
        return make_config(**(defaults | {"additional_config": {"turboquant": True}} | settings))

    return make


OF_THE_MODEL = ["key_constants", "compression_loss", "decode_answers"]
"""Results that do not depend on the server's limits."""


OF_ANY_FORMAT = ["key_constants", "decode_answers"]
"""Of these, what does not depend on the formats."""


def measured_before(worker: MetalWorker) -> list[str]:
    """What a later start of `worker` reads instead of measuring it."""
    worker.determine_available_memory()
    return worker.results.read


def constants_of(worker: MetalWorker) -> list[tuple[bytes, bytes]]:
    codecs = [backend.key_codec for backend in worker.model_pages.backends]
    return [(bytes(codec.centre), bytes(codec.key_factors)) for codec in codecs]


def test_a_second_start_measures_nothing(make_compressed, monkeypatch, tmp_path):
    first = loaded_worker(make_compressed())
    assert measured_before(first) == []
    names = {path.name.split("-")[0] for path in (tmp_path / "cache/vllm_metal/startup").iterdir()}
    assert names == {*OF_THE_MODEL, "forward_peaks"}

    def unwanted(*_):
        raise AssertionError("measured although it was kept")

    monkeypatch.setattr(compression, "calibrate", unwanted)
    monkeypatch.setattr(compression.loss_check, "measure_loss", unwanted)
    monkeypatch.setattr(worker_module.workspace_probe, "prefill_peaks", unwanted)
    monkeypatch.setattr(worker_module.workspace_probe, "decode_peaks", unwanted)
    monkeypatch.setattr(worker_module.decode_probe, "ask", unwanted)
    second = loaded_worker(make_compressed())
    assert measured_before(second) == [*OF_THE_MODEL, "forward_peaks"]
    assert second.decode_answers == first.decode_answers
    assert constants_of(second) == constants_of(first)
    assert second.step_memory == first.step_memory
    assert second.plan.workspace == first.plan.workspace


def test_formats_share_the_constants_and_not_the_memory(make_compressed):
    measured_before(loaded_worker(make_compressed()))
    other = {"turboquant": True, "k_quant": "q4_0", "v_quant": "q4_0"}
    assert measured_before(loaded_worker(make_compressed(additional_config=other))) == OF_ANY_FORMAT
    assert measured_before(loaded_worker(make_compressed(additional_config={}))) == [
        "decode_answers"
    ]


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({"max_model_len": 96}, ["decode_answers"]),
        pytest.param({"dtype": "bfloat16"}, [], marks=pytest.mark.nightly),
        pytest.param({"block_size": 32}, OF_THE_MODEL, marks=pytest.mark.nightly),
        pytest.param({"max_num_seqs": 4}, OF_THE_MODEL, marks=pytest.mark.nightly),
        pytest.param({"max_num_batched_tokens": 32}, OF_THE_MODEL, marks=pytest.mark.nightly),
        ({"additional_config": {"turboquant": True, "skip_layers": [0]}}, OF_ANY_FORMAT),
    ],
    ids=str,
)
def test_what_another_configuration_shares(make_compressed, settings, shared):
    measured_before(loaded_worker(make_compressed()))
    assert measured_before(loaded_worker(make_compressed(**settings))) == shared


def test_another_tokenizer_is_another_calibration(make_compressed, tmp_path):
    """It may lie outside the model's folder, with the same name and size."""
    measured_before(loaded_worker(make_compressed()))
    folder = save_checkpoint(tmp_path / "other", head_dim=64)
    save_tokenizer(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))
    config = make_compressed(tokenizer=str(folder))
    assert measured_before(loaded_worker(config)) == ["forward_peaks"]


def test_the_startup_cache_may_be_switched_off(make_compressed, monkeypatch, tmp_path):
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "off")
    for _ in range(2):
        assert measured_before(loaded_worker(make_compressed())) == []
    assert not (tmp_path / "cache").exists()
