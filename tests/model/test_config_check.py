"""A model that mlx-lm built from less than its `config.json` says is refused."""

import copy
import json

import pytest
from mlx_lm.utils import _get_classes
from tiny_architectures import ARCHITECTURES
from vllm.transformers_utils.config import get_config

from tests.tiny_models import config_of
from tests.transformers_form import TYPES, as_transformers_writes, earlier_config
from vllm_metal.errors import UserError
from vllm_metal.model import config_check
from vllm_metal.model.checkpoint_config import transformers_class, with_mlx_lm_keys
from vllm_metal.model.config_check import check_built_model
from vllm_metal.model.register_models import register_models

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(config):
    model_class, arguments_class = _get_classes(config)
    return model_class(arguments_class.from_dict(copy.deepcopy(config)))


def reasons(built, written, max_model_len=None):
    """Why a model, built from one configuration, is refused as that of another."""
    with pytest.raises(UserError, match="mlx-lm would not compute") as error:
        check_built_model(build(built), written, max_model_len)
    return error.value.reasons


def changed(name, *without, **changes):
    config = config_of(name, **changes)
    return {key: value for key, value in config.items() if key not in without}


def parameters(**values):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **values}}


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "phi3", "deepseek_v2", "gpt_oss", "mamba"]
)
def test_the_model_of_the_file_is_served(name):
    check_built_model(build(config_of(name)), config_of(name), max_model_len=512)


def test_another_base():
    assert reasons(config_of("llama"), config_of("llama", rope_theta=500000.0)) == [
        "in rope_parameters, rope_theta is 500000.0, but the model computes with rope_theta 10000 "
        "(layers 0, 1, 2, 3)"
    ]


def test_the_file_as_transformers_5_writes_it():
    """The fault that there was: mlx-lm takes its default for a key that it does not find."""
    written = changed("llama", "rope_theta", **parameters(rope_theta=500000.0))
    [reason] = reasons(written, written)
    assert "rope_theta is 500000.0" in reason
    check_built_model(build(with_mlx_lm_keys(written)), written)


def test_another_factor():
    written = config_of("llama", rope_scaling=LLAMA3)
    [reason] = reasons(config_of("llama", rope_scaling=LLAMA3 | {"factor": 4.0}), written)
    assert "rope_type is llama3" in reason and "factor is 8.0" in reason
    assert "another Llama3RoPE" in reason


def test_a_scaling_that_the_model_ignores():
    """mlx-lm's Qwen3 MoE reads `rope_scaling` and leaves it out."""
    written = config_of(
        "qwen3_moe",
        rope_scaling={"rope_type": "yarn", "factor": 4.0}
        | {"original_max_position_embeddings": 128},
    )
    [reason] = reasons(written, written)
    assert "rope_type is yarn" in reason and "rope_theta 10000" in reason


def test_an_attention_factor_that_the_model_does_not_read():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    check_built_model(
        build(config_of("llama", rope_scaling=yarn)), config_of("llama", rope_scaling=yarn)
    )
    written = config_of("llama", rope_scaling=yarn | {"attention_factor": 2.0})
    assert reasons(written, written)


def test_another_part_of_the_head():
    [reason] = reasons(
        config_of("phi3", partial_rotary_factor=1.0), config_of("phi3", partial_rotary_factor=0.5)
    )
    assert reason.startswith("rope_parameters.partial_rotary_factor is 0.5")
    assert "rotates 32 numbers" in reason


def test_a_part_that_the_model_cannot_have():
    """mlx-lm's GLM rotates whole heads; transformers' default for it is half of them."""
    glm = {**config_of("glm4"), "model_type": "glm"}
    [reason] = reasons(glm, glm)
    assert "partial_rotary_factor is 0.5" in reason


def test_bases_by_layer_type():
    local = config_of("gemma3_text", rope_theta=1e6, rope_local_base_freq=5e4)
    check_built_model(build(local), local)
    [reason] = reasons(config_of("gemma3_text", rope_theta=1e6), local)
    assert "rope_parameters.sliding_attention, rope_theta is 50000.0" in reason
    assert reason.endswith("(layers 0, 2)")


def test_an_earlier_key_that_transformers_leaves_out():
    """transformers 5 reads no `rope_theta` for the windows of OLMo 3, version 4 did."""
    config = config_of("olmo3", rope_theta=20000.0)
    check_built_model(build(config), config)


def test_a_type_that_transformers_does_not_know():
    config = {**config_of("afm7"), "rope_theta": 20000.0}
    check_built_model(build(config), config)
    assert reasons(config_of("afm7"), config)


@pytest.mark.parametrize(("longest", "refused"), [(None, False), (16, False), (17, True)])
def test_a_window_that_the_model_does_not_have(longest, refused):
    """Up to the window's length there is no difference."""
    written = {**config_of("llama"), "model_type": "mistral", "sliding_window": 16}
    if not refused:
        check_built_model(build(written), written, longest)
        return
    assert reasons(written, written, longest) == [
        "sliding_attention: sliding_window is 16, but the model has full attention; the two are "
        "the same with --max-model-len 16 (layers 0, 1, 2, 3)"
    ]


def test_a_window_of_another_length():
    [reason] = reasons(
        config_of("gemma3_text"), config_of("gemma3_text", sliding_window=16), max_model_len=512
    )
    assert "sliding_window is 16, but the model has a window of 8" in reason


def test_a_window_on_another_layer():
    written = config_of("gemma3_text", sliding_window_pattern=3)
    found = reasons(config_of("gemma3_text"), written, max_model_len=512)
    assert any("full_attention: it attends to all tokens" in reason for reason in found)


def test_a_part_that_is_not_in_the_file():
    """transformers adds one of its own; a file that mlx-lm wrote flat has the settings above it."""
    config = {**config_of("qwen2", rope_theta=20000.0), "model_type": "qwen2_vl"}
    check_built_model(build(config), config)


VLLM_CANNOT = {
    "pixtral": "transformers has a vision part of this name",
    "deepseek_v41": "it is refused; its layers choose between two embeddings",
    "olmo": "mlx-lm's own code needs another package",
}
"""Architectures of which vLLM has no configuration that could be compared."""

ANOTHER_KEY = ("phi3small", "prism_hadamard_qwen35")
"""Architectures that read no `rope_theta`, of which the tiny configuration has one."""

FAST = (
    *("llama", "gemma3", "gemma3_text", "gemma4_text", "gpt_neox", "gpt_oss", "kimi_k25"),
    *("lfm2-vl", "mimo_v2_flash", "phi3", "qwen3_5", "qwen3_next", "step3p5"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.nightly)
        for name in ARCHITECTURES
        if name not in VLLM_CANNOT
    ],
)
def test_the_model_is_the_one_of_vllms_configuration(name, tmp_path):
    """Frequencies and windows of every layer, for all types that mlx-lm has.

    `config.json` is as transformers 5 writes it where transformers knows the type.
    """
    register_models()
    written = as_transformers_writes(earlier_config(name)) if name in TYPES else config_of(name)
    text = written.get("text_config", written)
    if name in ANOTHER_KEY:
        del text["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    said = get_config(tmp_path, trust_remote_code=False).get_text_config()
    said = {**said.__dict__, **said.to_dict()}
    model = build(with_mlx_lm_keys(written))
    assert list(config_check._rope_differences(model, text, said)) == []
    assert list(config_check._window_differences(model, said, 512)) == []


def test_vllms_class_of_a_type_does_not_take_the_place_of_transformers(tmp_path):
    """vLLM registers classes of its own, which lack transformers' other names of keys."""
    register_models()
    written = as_transformers_writes(earlier_config("step3p5"))
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = get_config(tmp_path, trust_remote_code=False)
    assert type(read) is not transformers_class("step3p5")
    assert with_mlx_lm_keys(written)["num_attention_groups"] == written["num_key_value_heads"]
