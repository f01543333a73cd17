"""What cannot be served ends with one message, a non-zero exit code and no stack."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text


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


def test_unknown_key_and_other_reasons_come_at_once(demo_model):
    done = serve(
        demo_model,
        *("--additional-config", '{"turbo": true}'),
        *("--block-size", "17", "--max-model-len", "256"),
    )
    assert_refused(done, "unknown key 'turbo'", "--block-size 17")


def test_unknown_device(demo_model):
    done = serve(demo_model, VLLM_METAL_DEVICE="gpu")
    assert_refused(done, "VLLM_METAL_DEVICE='gpu'", "auto, metal, cuda, cpu")


def test_too_little_memory_names_what_would_fit(demo_model):
    done = serve(demo_model, "--kv-cache-memory-bytes", str(32 << 20), "--max-model-len", "2048")
    assert_refused(done, "Too little memory for one request of 2048 tokens", "--max-model-len 704")


@pytest.fixture(scope="module")
def sliding_window_model(demo_model, tmp_path_factory):
    """A tiny random gemma3_text, whose layers need sliding windows."""
    folder = tmp_path_factory.mktemp("gemma3")
    config = {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 512,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "max_position_embeddings": 512,
        "sliding_window_pattern": 6,
        "dtype": "float32",
    }
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    mlx_lm.utils.save_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return folder


def test_unservable_model_is_named_with_the_reason(sliding_window_model):
    done = serve(sliding_window_model, "--max-model-len", "256")
    assert_refused(done, "'gemma3_text' cannot be served", "sliding-window attention")
