"""What is refused from the configuration of a checkpoint, before its weights are read."""

import json
from pathlib import Path

import pytest
from transformers import WhisperConfig

from vllm_metal.errors import UserError
from vllm_metal.platform import unsupported

WHISPER = "WhisperForConditionalGeneration"


def refusal(make_config, **settings) -> str:
    with pytest.raises(UserError) as error:
        make_config(**settings)
    return str(error.value)


def config_file(folder: Path, **settings) -> str:
    """A model folder that holds a configuration only."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "format fp8 are not served"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "format gptq are not served"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "format bitsandbytes are not"),
        ({"quant_method": "unheard_of"}, "format unheard-of are not served"),
    ],
)
def test_weights_in_other_formats_are_refused(
    make_config, checkpoint, tmp_path, quantization, words
):
    settings = json.loads((checkpoint / "config.json").read_text())
    folder = config_file(tmp_path / "model", **settings, quantization_config=quantization)
    assert words in refusal(make_config, model=folder)


@pytest.mark.parametrize("asked", [None, "awq"])
def test_weights_that_mlx_lm_reads_are_served(make_config, checkpoint, tmp_path, asked):
    """In every type of activations, though vLLM's own kernels for AWQ take float16 alone."""
    settings = json.loads((checkpoint / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    folder = config_file(tmp_path / "model", **settings, quantization_config=quantization)
    for dtype in ("float32", "bfloat16"):
        assert unsupported(make_config(model=folder, dtype=dtype, quantization=asked)) == []


def test_another_format_than_the_weights_have(make_config, checkpoint, tmp_path):
    settings = json.loads((checkpoint / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    folder = config_file(tmp_path / "model", **settings, quantization_config=quantization)
    with pytest.raises(Exception, match="does not match the quantization method"):
        make_config(model=folder, quantization="gptq")


def test_a_model_that_mlx_lm_does_not_know(make_config, tmp_path):
    """vLLM and transformers know it."""
    folder = config_file(
        tmp_path / "model",
        model_type="opt",
        architectures=["OPTForCausalLM"],
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    text = refusal(make_config, model=folder)
    assert (
        "architecture OPTForCausalLM: mlx-lm has no model of the type opt (it has: afm7, " in text
    )
    assert "mistral" in text


def test_mlxs_own_quantisation_is_served(make_config, checkpoint, tmp_path):
    settings = json.loads((checkpoint / "config.json").read_text())
    quantization = {"group_size": 32, "bits": 4}
    settings |= {"quantization": quantization, "quantization_config": quantization}
    assert unsupported(make_config(model=config_file(tmp_path / "model", **settings))) == []


def test_encoders_are_refused(make_config, tmp_path):
    folder = config_file(
        tmp_path / "model",
        **WhisperConfig(max_target_positions=128, architectures=[WHISPER]).to_dict(),
    )
    assert "encoder-decoder models" in refusal(make_config, model=folder)
