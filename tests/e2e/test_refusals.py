"""What cannot be served ends with one message, a non-zero exit code and no stack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import config_of

pytestmark = pytest.mark.engine


def serve(model: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--dtype", "float32", *arguments),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


def assert_refused(done: subprocess.CompletedProcess, *messages: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode != 0
    for message in messages:
        assert message in output, output[-3000:]
    assert "Traceback" not in output, output[-5000:]


@pytest.mark.nightly
def test_unknown_key_and_other_reasons_come_at_once(demo_model):
    done = serve(
        demo_model,
        *("--additional-config", '{"turbo": true}'),
        *("--block-size", "17", "--max-model-len", "256"),
    )
    assert_refused(done, "unknown key 'turbo'", "--block-size 17")


@pytest.mark.nightly
def test_unknown_device(demo_model):
    done = serve(demo_model, VLLM_METAL_DEVICE="gpu")
    assert_refused(done, "VLLM_METAL_DEVICE='gpu'", "auto, metal, cuda, cpu")


@pytest.mark.nightly
def test_too_little_memory_names_what_would_fit(demo_model):
    done = serve(demo_model, "--kv-cache-memory-bytes", str(32 << 20), "--max-model-len", "2048")
    assert_refused(done, "Too little memory for one request of 2048 tokens", "--max-model-len 704")


@pytest.fixture
def unknown_model(tmp_path, demo_model) -> Path:
    """A model type that vLLM knows and mlx-lm does not."""
    config = config_of("llama", architectures=["OPTForCausalLM"]) | {"model_type": "opt"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((demo_model / name).read_bytes())
    return tmp_path


@pytest.mark.nightly
def test_unservable_model_is_named_with_the_reason(unknown_model):
    done = serve(unknown_model, "--max-model-len", "256")
    assert_refused(done, "architecture OPTForCausalLM", "mlx-lm has no model of the type opt")
