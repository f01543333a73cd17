"""Fixtures shared by the tests of the engine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.e2e import engine as e2e
from tests.tiny_models import save_checkpoint, save_tokenizer

SERVED_MODEL = "smollm2"
"""Name of the demo model at the server."""


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory) -> Path:
    """A tiny Llama that reads characters: calibration needs a tokenizer."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "characters", **sizes)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def long_heads_model(tmp_path_factory) -> Path:
    """The same with heads of 128, whose compressed keys have levels."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "long_heads", head_dim=128)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def demo_engine(demo_model) -> Iterator[LLM]:
    """The demo model as it is served by default. Tests with it are a group of `tests/parallel.py`.

    What is in its prefix cache is what earlier tests have left there.
    """
    with e2e.engine(demo_model) as llm:
        yield llm


@contextlib.contextmanager
def serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """A running server of this model under the name `SERVED_MODEL`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--served-model-name", SERVED_MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", *options),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None or _answers(address):
                break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield address
        served = log.read_text()
        assert "Traceback" not in served
        assert "KV cache plan" in served
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def server(demo_model, tmp_path_factory) -> Iterator[str]:
    """Address of a running server with the demo model, as agents want it.

    Tests with it are a group of `tests/parallel.py`.
    """
    options = [
        *("--max-model-len", "2048", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(400 << 20)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        "--enable-prompt-tokens-details",
    ]
    with serve(demo_model, tmp_path_factory.mktemp("server") / "log", *options) as address:
        yield address


def metric(address: str, name: str) -> float:
    """The value of a server's metric."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    assert values, f"{name} is not at /metrics"
    return float(values[0])


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=2).status == 200
    except OSError:
        return False
