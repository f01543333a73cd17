"""An engine that is a fork of its parent: only where MLX was kept out of the parent."""

import os
import sys

import pytest

from vllm_metal.errors import UserError
from vllm_metal.machine import engine_process
from vllm_metal.machine.engine_process import METHOD_VARIABLE

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="no fork is used elsewhere")


@pytest.fixture
def fork_asked_for(monkeypatch):
    monkeypatch.setenv(METHOD_VARIABLE, "fork")


@pytest.fixture
def without_mlx(fork_asked_for, monkeypatch):
    """This process as it is before MLX is imported."""
    monkeypatch.delitem(sys.modules, "mlx.core")


def refuse() -> None:
    raise UserError("This model cannot be compressed", ["layer 0: it is odd"])


def die() -> None:
    os._exit(7)


@linux_only
def test_mlx_is_asked_in_a_fork(without_mlx):
    assert engine_process.ask(os.getpid) != os.getpid()
    assert os.environ[METHOD_VARIABLE] == "fork"


@linux_only
def test_its_errors_are_raised_here(without_mlx):
    with pytest.raises(UserError, match="cannot be compressed") as error:
        engine_process.ask(refuse)
    assert error.value.reasons == ["layer 0: it is odd"]


@linux_only
def test_a_fork_that_dies_is_an_error(without_mlx):
    with pytest.raises(RuntimeError, match="asked MLX about the model ended with 7"):
        engine_process.ask(die)


@linux_only
def test_a_process_that_has_mlx_is_not_forked(fork_asked_for, caplog):
    assert engine_process.ask(os.getpid) == os.getpid()
    assert os.environ[METHOD_VARIABLE] == "spawn"
    assert "=fork is not used, but spawn: this process has imported MLX" in caplog.text


def test_macos_does_not_fork(without_mlx, caplog, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert engine_process.ask(os.getpid) == os.getpid()
    assert os.environ[METHOD_VARIABLE] == "spawn"
    assert "macOS" in caplog.text


def test_a_spawned_engine_needs_no_care(without_mlx, monkeypatch, caplog):
    monkeypatch.setenv(METHOD_VARIABLE, "spawn")
    assert engine_process.ask(os.getpid) == os.getpid()
    assert os.environ[METHOD_VARIABLE] == "spawn" and caplog.text == ""
