"""What vLLM meets first: the entry point, and the platform it names."""

import importlib.metadata
import importlib.util
import os
import sys

import pytest

import vllm_metal


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Lets `register` change the environment and the exception hook of this test only."""
    names = "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_USE_V2_MODEL_RUNNER"
    for name in (*names, "VLLM_COMPUTE_NANS_IN_LOGITS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_vllm_finds_the_entry_point():
    [entry] = importlib.metadata.entry_points(group="vllm.platform_plugins", name="metal")
    assert entry.load() is vllm_metal.register


def test_vllm_chooses_this_platform():
    from vllm.platforms import current_platform

    assert type(current_platform).__name__ == "MetalPlatform"
    assert vllm_metal.register() == f"{type(current_platform).__module__}.MetalPlatform"


def test_without_mlx_nothing_is_registered(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlx" else found(name)
    )
    assert vllm_metal.register() is None
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ


def test_engine_processes_are_spawned_and_use_the_first_runner_protocol():
    vllm_metal.register()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_requests_with_nans_are_counted_unless_the_user_objects(monkeypatch):
    vllm_metal.register()
    assert os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] == "1"
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "0")
    vllm_metal.register()
    assert os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] == "0"


def test_the_users_way_of_starting_processes_is_respected(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    vllm_metal.register()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


def test_registering_twice_installs_one_hook():
    vllm_metal.register()
    hook = sys.excepthook
    vllm_metal.register()
    assert sys.excepthook is hook
