"""Which device serves, and how much memory may be planned with."""

import mlx.core as mx
import psutil
import pytest

from vllm_metal.errors import UserError
from vllm_metal.machine import device
from vllm_metal.machine.device import (
    DEVICE_VARIABLE,
    mac_working_set,
    machine_memory,
    requested_device,
    select_device,
)

FOUND = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def same_device_afterwards():
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def test_automatic_unless_said_otherwise(monkeypatch):
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    assert requested_device() == "auto"
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert requested_device() == "cpu"


@pytest.mark.parametrize("value", ["gpu", "", "CPU", "mps"])
def test_an_unknown_device(monkeypatch, value):
    monkeypatch.setenv(DEVICE_VARIABLE, value)
    with pytest.raises(UserError) as error:
        requested_device()
    assert repr(value) in str(error.value)
    assert "allowed: auto, metal, cuda, cpu" in str(error.value)


def test_automatic_takes_what_is_there(monkeypatch):
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    chosen = select_device()
    assert chosen.kind == FOUND
    assert chosen.name and chosen.memory_limit > 0


def test_metal_keeps_what_may_be_planned_wired(monkeypatch):
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    wired = []
    info = {"device_name": "Apple M4 Max", "max_recommended_working_set_size": 90 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_default_device", lambda device: None)
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    chosen = select_device()
    assert chosen == device.Device("metal", "Apple M4 Max", 90 << 30, 0)
    assert wired == [90 << 30]


def test_the_cpu_can_always_be_asked_for(monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    chosen = select_device()
    assert chosen.kind == "cpu"
    assert mx.default_device() == mx.Device(mx.cpu)
    assert 0 < chosen.memory_limit <= psutil.virtual_memory().total
    assert 0 <= chosen.memory_in_use < chosen.memory_limit


@pytest.mark.parametrize("kind", [kind for kind in ("metal", "cuda") if kind != FOUND])
def test_a_device_that_is_not_there(monkeypatch, kind):
    monkeypatch.setenv(DEVICE_VARIABLE, kind)
    with pytest.raises(UserError) as error:
        select_device()
    assert f"no {kind} backend" in str(error.value)
    assert f"it offers: {FOUND}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "limited"), [("1073741824\n", True), ("max\n", False), (f"{1 << 62}\n", False)]
)
def test_memory_of_a_container(monkeypatch, tmp_path, text, limited):
    """Both cgroup versions write a number; version 2 writes `max` for none, 1 a huge one."""
    (tmp_path / "memory.max").write_text(text)
    paths = (tmp_path / "missing", tmp_path / "memory.max")
    monkeypatch.setattr(device, "_CGROUP_LIMITS", paths)
    expected = 1 << 30 if limited else psutil.virtual_memory().total
    assert machine_memory() == expected


@pytest.mark.parametrize(
    ("ram", "reported"), [(16, 16 * 2 / 3), (32, 21845.34 / 1024), (64, 48), (96, 72)]
)
def test_a_macs_working_set(ram, reported):
    """As Macs have reported it."""
    assert mac_working_set(ram << 30) / 2**30 == pytest.approx(reported, rel=1e-5)
