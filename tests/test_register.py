"""What vLLM meets first: the entry point, and the platform it names."""

import importlib.metadata
import importlib.util
import logging
import multiprocessing
import os
import subprocess
import sys

import pytest

import vllm_metal
from tests.machine.test_installation import install


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


@pytest.fixture
def log(monkeypatch) -> list[logging.LogRecord]:
    """What the plugin logs. vLLM's loggers propagate only until they are configured."""
    records = []
    monkeypatch.setattr(vllm_metal._logger, "handle", records.append)
    return records


@pytest.fixture
def without_mlx(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlx" else found(name)
    )


def test_without_mlx_nothing_is_registered_and_the_log_says_so(without_mlx, log):
    assert vllm_metal.register() is None
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    [record] = log
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("vllm_metal needs mlx, which cannot be found")
    assert "(pip install mlx)" in record.getMessage()


def test_processes_that_are_started_do_not_say_it_again(without_mlx, log, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    assert vllm_metal.register() is None
    assert log == []


def test_what_fails_is_logged_with_its_reason(monkeypatch, log):
    """vLLM would log it at its debug level, and take another platform."""
    monkeypatch.setitem(sys.modules, "vllm_metal.machine.blas", None)
    assert vllm_metal.register() is None
    [record] = log
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("vllm_metal failed")
    assert "vllm_metal.machine.blas" in str(record.exc_info[1])


@pytest.mark.nightly
@pytest.mark.parametrize("module", ["vllm_metal.platform", "vllm_metal.errors"])
def test_the_terminal_shows_what_fails(module):
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from vllm.platforms import current_platform\n"
        "print(type(current_platform).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] in ("CpuPlatform", "UnspecifiedPlatform")
    shown = done.stdout + done.stderr
    assert "vllm_metal failed, so vLLM runs on another platform" in shown
    assert f"import of {module} halted" in shown


def test_a_second_distribution_of_the_package_is_named(tmp_path, monkeypatch, log):
    install(tmp_path, "another-plugin")
    monkeypatch.syspath_prepend(tmp_path)
    vllm_metal._warn_of_other_distributions.cache_clear()
    assert vllm_metal.register() and vllm_metal.register()
    [record] = log
    assert "installed by another-plugin 2.0 and by vllm-metal" in record.getMessage()
    assert "pip uninstall another-plugin vllm-metal" in record.getMessage()


def test_engine_processes_are_spawned_and_use_the_first_runner_protocol():
    vllm_metal.register()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_requests_with_nan_logits_are_counted_unless_the_user_says_otherwise(monkeypatch):
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
