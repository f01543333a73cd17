"""The script behind `make demo`, run as a user runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_demo.py"

SERVER_LOG = """\
(APIServer pid=1) INFO 11-21 23:22:01 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=7) INFO 11-21 23:22:01 [worker.py:12] KV cache plan
(EngineCore pid=7) INFO 11-21 23:22:01 [worker.py:12]     blocks  1,456 of 16 tokens
(EngineCore pid=7) INFO 11-21 23:22:01 [worker.py:12]     tokens  23,280
(EngineCore pid=7) INFO 11-21 23:22:01 [core.py:402] init engine took 3 s
(APIServer pid=1) INFO 11-21 23:22:01 [launcher.py:186]     Route: /health
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("serve_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def servers() -> list[psutil.Process]:
    """Running processes of any `vllm serve` with the demo's served name."""
    found = []
    for process in psutil.process_iter():
        try:
            if "--served-model-name demo" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_memory_report(script):
    assert script.memory_report(SERVER_LOG) == (
        "KV cache plan\n    blocks  1,456 of 16 tokens\n    tokens  23,280"
    )
    with pytest.raises(script.DemoError, match="no KV cache plan"):
        script.memory_report("(APIServer pid=1) INFO 11-21 23:22:01 [a.py:1] hello\n")


def test_progress_elsewhere_than_on_a_terminal(script, capsys):
    progress = script.Progress()
    for seconds in (0.0, 9.9, 10.1, 15.0, 20.0, 20.2):
        progress.show(f"waited {seconds}", seconds)
    progress.end("ready")
    assert capsys.readouterr().out.splitlines() == ["waited 10.1", "waited 20.2", "ready"]


def test_progress_on_a_terminal(script, capsys, monkeypatch):
    monkeypatch.setattr(script.sys.stdout, "isatty", lambda: True)
    progress = script.Progress()
    progress.show("waited 0.5", 0.5)
    progress.end("ready")
    assert capsys.readouterr().out == "\r\033[Kwaited 0.5\r\033[Kready\n"


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_stop_where_the_group_has_ended(script, monkeypatch, error):
    """Linux says that there is no such group, macOS that a group of zombies may not be killed."""

    def killpg(group, number):
        raise error

    monkeypatch.setattr(script.os, "killpg", killpg)
    server = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    script.stop(server)
    assert server.returncode is not None


@pytest.mark.engine
@pytest.mark.nightly
def test_question_answer_report_and_stop(demo_model):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--", "--max-num-seqs", "2"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"Answer: .*Paris", run.stdout)
    assert re.search(r"KV cache plan\n +device ", run.stdout)
    assert re.search(r"\n +compressed +30 of 30 layers\n", run.stdout)
    assert run.stderr == "" and servers() == []


@pytest.mark.engine
@pytest.mark.nightly
def test_a_server_that_does_not_start(demo_model):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--", "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1
    assert "--no-such-option" in run.stderr and "ended with exit code" in run.stderr
    assert "Traceback" not in run.stderr and servers() == []


@pytest.mark.engine
def test_interrupt_leaves_no_server(demo_model):
    run = subprocess.Popen(
        [sys.executable, SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not servers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert servers()
    time.sleep(1)
    os.kill(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "Interrupted" in errors and "Traceback" not in errors and servers() == []
