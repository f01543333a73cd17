"""A process that did not survive is remembered; one that did, or still runs, is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_metal.startup.crash_marker import CrashMarker

FACTS = {"model": "a", "mlx": "1"}


@pytest.fixture
def marker(tmp_path) -> CrashMarker:
    return CrashMarker(tmp_path / "tracing", FACTS)


def in_another_process(marker: CrashMarker, then: str) -> int:
    """Exit code of a process that is in the middle of it and then runs `then`."""
    program = f"""
import os, signal
from pathlib import Path
from vllm_metal.startup.crash_marker import CrashMarker
with CrashMarker(Path({str(marker.path.parent)!r}), {FACTS!r}).trying():
    {then}
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode


def test_a_process_that_died_is_remembered(marker):
    assert not marker.left_behind
    assert in_another_process(marker, "os.kill(os.getpid(), signal.SIGFPE)") == -signal.SIGFPE
    assert marker.left_behind
    assert not CrashMarker(marker.path.parent, FACTS | {"mlx": "2"}).left_behind


TRACING_DIES = """
import os, signal, sys
from pathlib import Path
from tests.tiny_models import tiny_model
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup import decode_probe
from vllm_metal.startup.crash_marker import CrashMarker
if sys.argv[2] == "dies":
    DecodeGraphs.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGFPE)
marker = CrashMarker(Path(sys.argv[1]), {})
prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
print(decode_probe.ask(ModelBinding(tiny_model("llama")), prompts, marker).traced)
"""


@pytest.mark.nightly
def test_after_a_start_that_tracing_killed_the_next_one_decodes_untraced(tmp_path):
    """As a division by zero in MLX's C++ kills it; once the mark is deleted, it is tried again."""
    path = os.pathsep.join([os.getcwd(), str(Path.cwd() / "scripts")])

    def start(what: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", TRACING_DIES, str(tmp_path / "tracing"), what]
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert start("dies").returncode == -signal.SIGFPE
    [mark] = (tmp_path / "tracing").iterdir()
    survived = start("lives")
    assert survived.returncode == 0, survived.stderr
    assert "holds=False" in survived.stdout and "ended in the middle of it" in survived.stdout
    assert str(mark) in survived.stdout
    mark.unlink()
    assert "holds=True" in start("lives").stdout


@pytest.mark.parametrize("then", ["pass", "raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_a_process_that_ended_otherwise_is_not(marker, then):
    in_another_process(marker, then)
    assert not marker.left_behind and not marker.path.exists()


def test_a_process_that_is_in_the_middle_of_it_is_not(marker):
    with marker.trying():
        assert marker.path.exists() and not marker.left_behind


def test_another_process_with_the_same_number_is_told_apart(marker):
    """In a container the next start may well have it."""
    marker.path.parent.mkdir(parents=True)
    marker.path.write_text(f"{os.getpid()} 1.00\n")
    assert marker.left_behind


@pytest.mark.parametrize("content", ["", "rubbish\n", "12 three four\n"])
def test_a_damaged_file_is_one_that_was_left_behind_or_none(marker, content):
    marker.path.parent.mkdir(parents=True)
    marker.path.write_text(content)
    assert marker.left_behind is bool(content)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    marker = CrashMarker(tmp_path / "file", FACTS)
    with marker.trying():
        assert not marker.left_behind


def test_without_a_folder_nothing_is_marked():
    marker = CrashMarker(None, FACTS)
    with marker.trying():
        assert not marker.left_behind
