"""The limit on operations of a Metal command buffer, by chip and by what the user set."""

import os
import subprocess
import sys

import pytest

from vllm_metal.machine import command_buffers
from vllm_metal.machine.command_buffers import VARIABLE, generation_of, raise_operations_per_buffer


@pytest.fixture
def mac(monkeypatch):
    """Makes this a Mac with a chip of a name; gives the commands that were run."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys, "platform", "darwin")
    commands = []

    def with_chip(name: str) -> list:
        def run(command, **_):
            commands.append(command)
            return subprocess.CompletedProcess(command, 0, stdout=name + "\n")

        monkeypatch.setattr(command_buffers.subprocess, "run", run)
        return commands

    return with_chip


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M3 Ultra", "Apple M4 Pro"])
def test_raised_before_m5(mac, chip):
    mac(chip)
    raise_operations_per_buffer()
    assert os.environ[VARIABLE] == "1000"


@pytest.mark.parametrize("chip", ["Apple M5", "Apple M10 Max", "Apple A18 Pro", "VirtualApple", ""])
def test_left_alone_on_other_chips(mac, chip):
    mac(chip)
    raise_operations_per_buffer()
    assert VARIABLE not in os.environ


def test_what_the_user_set_stays_and_macos_is_not_asked(mac, monkeypatch):
    commands = mac("Apple M1")
    monkeypatch.setenv(VARIABLE, "7")
    raise_operations_per_buffer()
    assert os.environ[VARIABLE] == "7" and not commands


def test_left_alone_where_macos_does_not_tell(mac, monkeypatch):
    mac("Apple M1")

    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(command_buffers.subprocess, "run", fail)
    raise_operations_per_buffer()
    assert VARIABLE not in os.environ


def test_left_alone_on_other_systems(mac, monkeypatch):
    mac("Apple M1")
    monkeypatch.setattr(sys, "platform", "linux")
    raise_operations_per_buffer()
    assert VARIABLE not in os.environ


def test_generations():
    assert [generation_of(name) for name in ("Apple M2 Max", "Apple M12", "Intel M3")] == [
        2,
        12,
        None,
    ]
