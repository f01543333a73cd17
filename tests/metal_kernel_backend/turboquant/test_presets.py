"""Names of pairs and of formats that users bring, and what each stands for."""

import pytest
from vllm.config.cache import CacheDType

from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    VALUE_FORMATS,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS, measured_loss
from vllm_metal.metal_kernel_backend.turboquant.presets import (
    AVERAGE_BITS,
    PRESETS,
    VLLM_PRESETS,
    allowed_formats,
    describe,
    format_by_name,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_shown_and_measured(preset):
    pair = PRESETS[preset]
    assert pair in SHOWN_PAIRS
    assert 0 < measured_loss(pair).kld < 1


def test_vllms_names_are_all_there():
    assert set(VLLM_PRESETS) == {name for name in CacheDType.__args__ if "turboquant" in name}


@pytest.mark.parametrize("name", AVERAGE_BITS)
def test_average_bits_are_those_of_the_codes(name):
    key, value = PRESETS[name]
    assert name == f"{(key.bits + value.bits) / 2}bit"


@pytest.mark.parametrize(("name", "pair"), [("k4v2", "q4_0/q2_0"), ("k8v3", "q8_0/q3_0")])
def test_bits_of_keys_and_values(name, pair):
    assert str(PRESETS[name]) == pair


@pytest.mark.parametrize("formats", [KEY_FORMATS, VALUE_FORMATS], ids=["keys", "values"])
def test_one_format(formats):
    for name, format in formats.items():
        assert format_by_name(name, formats) is format
    assert format_by_name("4bit", formats) is formats["q4_0"]
    for wrong in ("7bit", "2.5bit", "q7_0", "", 4, None, ["q4_0"]):
        assert format_by_name(wrong, formats) is None
    for name in allowed_formats(formats).split(", "):
        assert format_by_name(name, formats) is not None


@pytest.mark.parametrize("preset", ["2.5bit", None])
def test_the_line_at_start(preset):
    """What a name was taken for, and the loss with the model that it was measured on."""
    pair = PRESETS["2.5bit"]
    text = describe(TurboQuantConfig(pair, preset), "a/model", 64)
    assert text.startswith("preset 2.5bit: k_quant" if preset else "k_quant q3_0, v_quant q2_0;")
    assert text.endswith(f"measured loss: {measured_loss(pair, 'a/model', 64)}")
    unknown = TurboQuantConfig(parse_pair("int2/q2_0"))
    assert describe(unknown, "a/model").endswith("has not been measured")
