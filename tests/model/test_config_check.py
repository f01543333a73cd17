"""A model that mlx-lm built from less than its `config.json` says is refused."""

import copy

import pytest
from mlx_lm.utils import _get_classes

from tests.tiny_models import config_of
from vllm_metal.errors import UserError
from vllm_metal.model.checkpoint_config import with_mlx_lm_keys
from vllm_metal.model.config_check import check_built_model

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
