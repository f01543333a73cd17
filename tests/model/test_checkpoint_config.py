"""What transformers 5 writes gives the model that the keys of before gave, or is refused."""

import copy
import json
import sys
import types
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import tiny_architectures
from mlx.utils import tree_map
from mlx_lm.models import bitlinear_layers
from mlx_lm.utils import _get_classes

from tests.tiny_models import config_of, save_checkpoint
from tests.transformers_form import (
    LOCAL_THETA,
    SCALINGS,
    THETA,
    TYPES,
    as_transformers_writes,
    earlier_config,
    with_defaults_of,
)
from vllm_metal.errors import UserError
from vllm_metal.model.checkpoint_config import read_config, with_mlx_lm_keys
from vllm_metal.model.config_check import check_built_model

TOKENS = [[5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67]]
BOUND = 1e-5
"""Largest difference of logits, in standard deviations of the logits."""

COVERING = [
    # flat; with a scaling; another name of the base; part of a head; nested, in two ways
    ("llama", "unscaled"),
    ("llama", "llama3"),
    ("gpt_neox", "unscaled"),
    ("phi3", "unscaled"),
    ("gemma3_text", "linear"),
    ("gemma4_text", "unscaled"),
    # within text_config; patterns of layers; aliases; names of layer types; refused
    ("gemma3", "unscaled"),
    ("cohere2", "unscaled"),
    ("qwen3_next", "unscaled"),
    ("qwen3_moe", "unscaled"),
    ("granitemoehybrid", "unscaled"),
    ("step3p5", "unscaled"),
    ("deepseek_v3", "yarn"),
    ("mixtral", "yarn"),
]
"""The fast ones, at least one for each way in which the two forms differ."""

IGNORES_SCALING = (
    "cohere cohere2 dbrx ernie4_5 ernie4_5_moe gemma gemma2 gemma3n glm glm4 glm4_moe gpt_neox "
    "granitemoehybrid helium lfm2 lfm2_moe llama4_text minimax mixtral nanochat olmo_hybrid phi "
    "qwen3_moe qwen3_vl_moe recurrent_gemma solar_open stablelm starcoder2"
).split()
"""mlx-lm's models that compute the same with and without a scaling."""

READS_ROPE_PARAMETERS = ("minimax_m3_vl",)
"""mlx-lm's models that read a scaling in the form of transformers 5 alone."""

CASES = [
    pytest.param(name, scaling, marks=[] if (name, scaling) in COVERING else pytest.mark.nightly)
    for name in TYPES
    for scaling in SCALINGS
]

sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))


@pytest.fixture(autouse=True)
def without_metal(monkeypatch):
    monkeypatch.setattr(
        bitlinear_layers.BitLinear, "execute_matmul_kernel", tiny_architectures._ternary_product
    )


def build(config):
    """mlx-lm's model of a configuration, with weights that depend on their shapes alone."""
    mx.random.seed(0)
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(copy.deepcopy(config)))
    keys = tiny_architectures._keys(0)
    model.update(tree_map(lambda a: tiny_architectures._random(a, next(keys)), model.parameters()))
    model.eval()
    return model


def logits(model):
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@cache
def both_forms(name, scaling):
    """(transformers 5's, the earlier one)."""
    earlier = earlier_config(name, SCALINGS[scaling])
    try:
        written = as_transformers_writes(earlier)
    except Exception as error:
        pytest.skip(f"transformers does not write it: {error}")
    return written, with_defaults_of(written, earlier)


def test_every_covering_case_is_one():
    assert set(COVERING) <= {tuple(case.values) for case in CASES}


@pytest.mark.parametrize(("name", "scaling"), CASES)
def test_transformers_5_gives_the_same_logits_or_is_refused(name, scaling):
    written, earlier = both_forms(name, scaling)
    try:
        model = build(with_mlx_lm_keys(written))
        check_built_model(model, written, max_model_len=512)
    except UserError as error:
        refused = name in IGNORES_SCALING or (name, scaling) in REFUSED
        assert scaling != "unscaled" and refused, error
        assert all("rope_parameters" in reason for reason in error.reasons)
        return
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        with pytest.raises(type(error)):  # mlx-lm refuses the earlier form, too
            logits(build(earlier))
        assert scaling != "unscaled", error
        return
    assert scaling == "unscaled" or name not in IGNORES_SCALING
    if name in READS_ROPE_PARAMETERS and scaling != "unscaled":
        with pytest.raises(UserError, match="rope_type is"):
            check_built_model(build(with_mlx_lm_keys(earlier)), earlier)
        return
    found, expected = logits(model), logits(build(earlier))
    assert np.abs(found - expected).max() < BOUND * expected.std()


SCALED = [name for name, scaling in SCALINGS.items() if scaling]
REFUSED = {
    # full attention has proportional frequencies, or frequencies that nothing scales
    *((name, scaling) for name in ("gemma4", "gemma4_text") for scaling in SCALED),
    *(("mimo_v2_flash", scaling) for scaling in SCALED),
    # it takes a linear scaling for none
    ("mellum", "linear"),
    # they know YaRN or LongRoPE alone, and take other scalings for it
    ("deepseek_v2", "linear"),
    ("deepseek_v2", "llama3"),
    ("minicpm3", "linear"),
    ("minicpm3", "llama3"),
    ("minicpm3", "yarn"),
    # it checks that the scaling is linear, and then leaves it out
    ("qwen2_moe", "linear"),
}


@pytest.mark.parametrize("name", IGNORES_SCALING)
@pytest.mark.nightly
def test_models_that_ignore_a_scaling(name):
    """What is refused would be computed without the scaling."""
    scaled, unscaled = (
        with_defaults_of(*both_forms(name, scaling)) for scaling in ("linear", "unscaled")
    )
    assert np.array_equal(logits(build(scaled)), logits(build(unscaled)))


@pytest.mark.parametrize("name", [name for name, _ in COVERING])
def test_the_earlier_form_is_left_alone(name):
    earlier = earlier_config(name)
    filled = with_mlx_lm_keys(earlier)
    assert {key: filled[key] for key in earlier if key != "text_config"} == {
        key: value for key, value in earlier.items() if key != "text_config"
    } or name in ("granitemoehybrid", "gemma4_text")


def test_a_key_that_is_given_in_both_forms_stays():
    config = {
        "rope_theta": 10000,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    filled = with_mlx_lm_keys(config)
    assert filled["rope_theta"] == 10000 and isinstance(filled["rope_theta"], int)


@pytest.mark.parametrize(
    ("layer_types", "key", "period"),
    [
        (["sliding_attention"] * 5 + ["full_attention"], "sliding_window_pattern", 6),
        (["sliding_attention", "full_attention"] * 3, "sliding_window_pattern", 2),
        (["sliding_attention"] * 4, "sliding_window_pattern", 5),
        (["linear_attention"] * 3 + ["full_attention"], "full_attention_interval", 4),
        (["full_attention", "sliding_attention"] * 2, "sliding_window_pattern", None),
        (["sliding_attention", "full_attention", "full_attention"], "sliding_window_pattern", None),
        (["full_attention"] * 3, "sliding_window_pattern", None),
    ],
)
def test_patterns_of_layers(layer_types, key, period):
    assert with_mlx_lm_keys({"layer_types": layer_types}).get(key) == period


def test_layers_without_a_pattern_are_refused():
    """mlx-lm's Gemma 3 knows one full layer in every so many, and takes a default otherwise."""
    config = earlier_config("gemma3_text")
    del config["sliding_window_pattern"]
    config["layer_types"] = ["full_attention", "sliding_attention"] * 2
    written = as_transformers_writes(config)
    model = build(with_mlx_lm_keys(written))
    with pytest.raises(UserError, match="full_attention: .*window of 8"):
        check_built_model(model, written, max_model_len=512)


def test_a_base_of_windows_that_mlx_lm_cannot_have_is_refused():
    config = earlier_config("olmo3") | {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
        }
    }
    del config["rope_theta"]
    written = as_transformers_writes(config)
    model = build(with_mlx_lm_keys(written))
    with pytest.raises(UserError, match="rope_parameters.sliding_attention, rope_theta is 23456"):
        check_built_model(model, written)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        read_config(tmp_path)


class TestOverrides:
    """`--hf-overrides`, as vLLM applies them."""

    def read(self, folder, **overrides):
        return read_config(save_checkpoint(folder / "model"), overrides)

    def test_a_setting_is_replaced(self, tmp_path):
        config = self.read(tmp_path, rms_norm_eps=1e-3)
        assert config.written["rms_norm_eps"] == config.for_mlx_lm["rms_norm_eps"] == 1e-3

    def test_nothing_else_changes(self, tmp_path):
        config = self.read(tmp_path, rms_norm_eps=1e-3)
        assert config.written == config_of("llama") | {"rms_norm_eps": 1e-3}

    def test_a_part_is_merged_and_another_dictionary_replaced(self, tmp_path):
        settings = {"text_config": {"a": 1, "b": {"x": 1, "y": 2}}, "model_type": "gemma3"}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        config = read_config(tmp_path, {"text_config": {"b": {"x": 3}}})
        assert config.written["text_config"] == {"a": 1, "b": {"x": 3}}

    def test_a_key_that_only_the_text_part_has(self, tmp_path):
        settings = {"text_config": {"rope_theta": 1e4}, "model_type": "gemma3"}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="no effect") as error:
            read_config(tmp_path, {"rope_theta": 1e6})
        assert '{"text_config": {"rope_theta": ...}}' in error.value.reasons[0]


def test_modelopts_file_of_its_own(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    found = read_config(folder).for_mlx_lm["quantization_config"]
    assert found == {"quant_method": "modelopt", **quantization}
