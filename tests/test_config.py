"""`additional_config` and `--kv-cache-dtype`: what is chosen, and every way to get it wrong."""

import dataclasses

import pytest
from vllm.config.cache import CacheDType

from vllm_metal.config import DEFAULT_FORMATS, dense_dtype, parse
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.presets import PRESETS, VLLM_PRESETS


def refusal(additional_config, cache_dtype: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        parse(additional_config, cache_dtype)
    return str(error.value)


@pytest.mark.parametrize("given", [None, {}, {"turboquant": False}], ids=str)
@pytest.mark.parametrize("cache_dtype", ["auto", "float16", "bfloat16"])
def test_dense_pages_by_default(given, cache_dtype):
    assert parse(given, cache_dtype) is None


@pytest.mark.parametrize("given", [["turboquant"], "turboquant", 1], ids=str)
def test_what_is_no_object_is_refused(given):
    """vLLM takes any object for its plugins."""
    assert f"additional_config: {given!r} is not a JSON object" in refusal(given)


def test_turboquant_with_its_default_formats():
    config = parse({"turboquant": True}, "auto")
    assert config == TurboQuantConfig(DEFAULT_FORMATS)
    assert str(config.formats) == "q8_0/q3_0"
    assert config.skipped(30) == frozenset()


def test_formats_by_name():
    config = parse({"turboquant": True, "k_quant": "q4_0", "v_quant": "q4_0"}, "auto")
    assert str(config.formats) == "q4_0/q4_0"
    only_keys = parse({"turboquant": True, "k_quant": "q4_0"}, "auto")
    assert only_keys.formats == (KEY_FORMATS["q4_0"], DEFAULT_FORMATS.value)


def test_every_key_format_is_taken():
    for name, format in KEY_FORMATS.items():
        config = parse({"turboquant": True, "k_quant": name, "allow_lossy": True}, "auto")
        assert config.formats == (format, DEFAULT_FORMATS.value)


def test_every_value_format_is_taken():
    for name, format in VALUE_FORMATS.items():
        config = parse({"turboquant": True, "v_quant": name}, "auto")
        assert config.formats == (DEFAULT_FORMATS.key, format)


@pytest.mark.parametrize("preset", VLLM_PRESETS)
def test_vllms_presets(preset):
    config = parse(None, preset)
    assert (config.formats, config.preset) == (VLLM_PRESETS[preset], preset)
    assert parse({"turboquant": True}, preset) == config
    assert parse({"skip_layers": [1]}, preset).skip_layers == (1,)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_the_additional_config(preset):
    config = parse({"preset": preset}, "auto")
    assert (config.formats, config.preset) == (PRESETS[preset], preset)
    assert parse({"turboquant": True, "preset": preset}, "auto") == config
    assert parse({"preset": preset, "skip_layers": [1]}, "auto").skip_layers == (1,)


def test_formats_by_their_bits():
    config = parse({"turboquant": True, "k_quant": "4bit", "v_quant": "3bit"}, "auto")
    assert str(config.formats) == "q4_0/q3_0" and config.preset is None


def test_the_value_is_frozen_and_equal_in_every_process():
    given = {"turboquant": True, "skip_layers": [2, 1]}
    first, second = parse(given, "auto"), parse(given, "auto")
    assert first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.formats = DEFAULT_FORMATS


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"turbo_quant": True},
            "unknown key 'turbo_quant' (allowed keys: turboquant, preset, k_quant",
        ),
        ({"turboquant": "yes"}, "turboquant: 'yes' is not true or false"),
        ({"turboquant": 1}, "turboquant: 1 is not true or false"),
        ({"turboquant": True, "k_quant": "q7_0"}, "k_quant: 'q7_0' is not known (allowed: "),
        ({"turboquant": True, "v_quant": 3}, "v_quant: 3 is not known"),
        ({"preset": "k7v2"}, "preset: 'k7v2' is not known (allowed: turboquant_k8v4, "),
        ({"preset": 2.5}, "preset: 2.5 is not known (allowed: turboquant_k8v4, "),
        ({"preset": ["k4v2"]}, "preset: ['k4v2'] is not known"),
        ({"turboquant": True, "k_quant": "k4v2"}, 'write "preset": "k4v2" in its place'),
        ({"turboquant": True, "v_quant": "2.5bit"}, "v_quant: '2.5bit' names a pair of formats"),
        ({"turboquant": True, "k_quant": "7bit"}, "uint8, 2bit, 3bit, 4bit, 5bit, 6bit, 8bit)"),
        ({"turboquant": True, "v_quant": ["q3_0"]}, "v_quant: ['q3_0'] is not known"),
        ({"turboquant": True, "skip_layers": 3}, "skip_layers: 3 is not a list"),
        ({"turboquant": True, "skip_layers": [-1]}, "skip_layers: [-1] is not a list"),
        ({"turboquant": True, "skip_layers": [True]}, "skip_layers: [True] is not a list"),
        ({"turboquant": True, "skip_layers": {"boundary": -1}}, "skip_layers: {'boundary'"),
        ({"turboquant": True, "skip_layers": {"ends": 1}}, "skip_layers: {'ends': 1}"),
        ({"turboquant": True, "allow_lossy": None}, "allow_lossy: None is not true or false"),
        ({"k_quant": "q8_0"}, 'additional_config: k_quant: no effect without "turboquant": true'),
        ({"turboquant": False, "skip_layers": [1]}, "skip_layers: no effect without"),
    ],
    ids=str,
)
def test_wrong_settings(given, reason):
    assert reason in refusal(given)


@pytest.mark.parametrize("k_quant", ["q2_0", "int2", "uint2"])
def test_keys_of_two_bits_need_a_yes(k_quant):
    given = {"turboquant": True, "k_quant": k_quant}
    assert '"allow_lossy": true' in refusal(given)
    assert '"allow_lossy": true' in refusal(given | {"allow_lossy": False})
    assert parse(given | {"allow_lossy": True}, "auto").formats.key.name == k_quant


@pytest.mark.parametrize(
    "given", [{"turboquant": False}, {"k_quant": "q8_0"}, {"turboquant": True, "v_quant": "q4_0"}]
)
def test_a_preset_and_other_formats_contradict(given):
    text = refusal(given, "turboquant_k8v4")
    assert "--kv-cache-dtype turboquant_k8v4 already selects k_quant q8_0 and v_quant q4_0" in text


@pytest.mark.parametrize("more", [{"turboquant": False}, {"k_quant": "q8_0"}, {"v_quant": "4bit"}])
def test_a_preset_of_the_additional_config_contradicts_other_formats(more):
    text = refusal({"preset": "k4v2"} | more)
    assert "preset 'k4v2' already selects k_quant q4_0 and v_quant q2_0" in text


def test_two_presets_contradict_each_other():
    text = refusal({"preset": "k4v2"}, "turboquant_k8v4")
    assert "--kv-cache-dtype turboquant_k8v4 already selects k_quant q8_0" in text
    assert "additional_config: preset 'k4v2' already selects k_quant q4_0" in text


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8_per_token_head", "nvfp4"])
def test_other_cache_types_of_vllm(cache_dtype):
    assert f"--kv-cache-dtype {cache_dtype} is not supported (allowed: auto, " in refusal(
        {}, cache_dtype
    )


def test_every_cache_type_that_is_offered_is_vllms():
    offered = (
        refusal({}, "fp8")
        .split("--kv-cache-dtype fp8 is not supported (allowed: ")[1]
        .split(")")[0]
    )
    assert set(offered.split(", ")) <= set(CacheDType.__args__)


def test_all_reasons_come_at_once():
    text = refusal({"nonsense": 1, "turboquant": "x", "v_quant": "y"}, "fp8")
    for part in ("'nonsense'", "turboquant: 'x'", "v_quant: 'y'", "--kv-cache-dtype fp8"):
        assert part in text


def test_type_of_dense_pages():
    assert dense_dtype("auto", "bfloat16") == "bfloat16"
    assert dense_dtype("float16", "bfloat16") == "float16"
    assert dense_dtype("turboquant_k8v4", "bfloat16") == "bfloat16"
