"""The keys of before that `rope_parameters` determines, and contradictions between the two."""

import pytest

from vllm_metal.errors import UserError
from vllm_metal.model.rope_parameters import (
    earlier_as_parameters,
    override_rope,
    scaling,
    with_earlier_keys,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NESTED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_a_file_without_them_stays_as_it_is():
    config = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert with_earlier_keys(config) == config


def test_flat_parameters():
    filled = with_earlier_keys({"rope_parameters": LLAMA3})
    assert filled["rope_theta"] == filled["rotary_emb_base"] == 500000.0
    assert filled["original_max_position_embeddings"] == 8192
    assert filled["rope_scaling"] == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_part_of_a_head():
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    filled = with_earlier_keys({"rope_parameters": parameters, "head_dim": 64})
    assert filled["partial_rotary_factor"] == filled["rotary_pct"] == 0.5
    assert filled["rotary_dim"] == 32
    assert filled["rope_scaling"] is None


def test_parameters_by_layer_type():
    filled = with_earlier_keys({"rope_parameters": NESTED})
    assert filled["rope_theta"] == 1e6
    assert filled["rope_local_base_freq"] == filled["swa_rope_theta"] == 1e4
    assert filled["rope_scaling"]["type"] == "linear"


def test_numbers_beside_the_dictionaries_are_left_out():
    filled = with_earlier_keys({"rope_parameters": {**NESTED, "rope_theta": 5.0}})
    assert filled["rope_theta"] == 1e6


def test_unequal_parts_of_a_head_determine_no_single_one():
    parameters = {name: dict(values) for name, values in NESTED.items()}
    parameters["full_attention"]["partial_rotary_factor"] = 0.5
    parameters["sliding_attention"]["partial_rotary_factor"] = 1.0
    assert "partial_rotary_factor" not in with_earlier_keys({"rope_parameters": parameters})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"rope_theta": 10000.0, "rope_parameters": LLAMA3}, ["rope_theta", "500000.0"]),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": LLAMA3}, ["rope_scaling", "llama3"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}, "rope_parameters": LLAMA3},
            ["rope_scaling", "factor"],
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            ["rope_scaling", "of type default"],
        ),
        (
            {"rope_local_base_freq": 1e5, "rope_parameters": NESTED},
            ["rope_local_base_freq", "rope_parameters.sliding_attention.rope_theta"],
        ),
        (
            {
                "partial_rotary_factor": 0.25,
                "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5},
            },
            ["partial_rotary_factor is 0.25", "0.5"],
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused_and_both_are_named(config, names):
    with pytest.raises(UserError, match="contradicts itself") as error:
        with_earlier_keys(config)
    [reason] = error.value.reasons
    assert all(name in reason for name in names)
    assert "rope_parameters" in reason


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 500000, "rope_scaling": None, "rope_parameters": LLAMA3},
        {"rope_scaling": {"type": "llama3", "factor": 8}, "rope_parameters": LLAMA3},
        {
            "rope_scaling": {"type": "su", "long_factor": [1, 2]},
            "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0, 2.0]},
        },
        {
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3]},
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 10000, "rope_parameters": NESTED},
    ],
    ids=str,
)
def test_what_agrees_is_kept(config):
    filled = with_earlier_keys(config)
    assert {key: filled[key] for key in config if config[key] is not None} == {
        key: value for key, value in config.items() if value is not None
    }


def test_the_type_of_scaling():
    assert scaling({"rope_type": "mrope"}) is None
    assert scaling({"type": "su", "factor": 2.0})["rope_type"] == "longrope"


def test_earlier_keys_as_parameters():
    config = {
        "rotary_emb_base": 5,
        "rotary_pct": 0.5,
        "rope_scaling": {"type": "yarn", "factor": 2},
    }
    assert earlier_as_parameters(config) == {
        "type": "yarn",
        "factor": 2,
        "rope_theta": 5,
        "partial_rotary_factor": 0.5,
    }
    assert earlier_as_parameters({"attn_config": {"rope_theta": 7.0}}) == {"rope_theta": 7.0}
    assert earlier_as_parameters({}) == {}


class TestOverrides:
    """A setting of the user's holds, in whichever form it and the file are."""

    def of(self, config, **overrides):
        changed = with_earlier_keys(override_rope(config, overrides))
        return {key: changed.get(key) for key in ("rope_theta", "rope_scaling")}

    def test_earlier_over_earlier(self):
        assert self.of({"rope_theta": 1e4}, rope_theta=1e6)["rope_theta"] == 1e6

    def test_earlier_under_another_name(self):
        assert override_rope({"rotary_emb_base": 5}, {"rope_theta": 7})["rotary_emb_base"] == 7

    def test_earlier_over_parameters(self):
        found = self.of({"rope_parameters": LLAMA3}, rope_theta=1e6)
        assert found["rope_theta"] == 1e6 and found["rope_scaling"]["factor"] == 8.0

    def test_a_scaling_over_parameters(self):
        yarn = {"rope_type": "yarn", "factor": 4.0}
        found = self.of({"rope_parameters": LLAMA3}, rope_scaling=yarn)
        assert found["rope_theta"] == 500000.0
        assert found["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", "factor": 4.0}

    def test_parameters_over_earlier(self):
        new = {"rope_type": "yarn", "factor": 4.0}
        old = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
        found = self.of(old, rope_parameters=new)
        assert found["rope_theta"] == 1e6
        assert found["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", "factor": 4.0}

    def test_parameters_over_parameters(self):
        new = {"rope_type": "default", "rope_theta": 7.0}
        assert self.of({"rope_parameters": LLAMA3}, rope_parameters=new) == {
            "rope_theta": 7.0,
            "rope_scaling": None,
        }

    def test_earlier_over_one_of_several(self):
        with pytest.raises(UserError, match="cannot be applied") as error:
            override_rope({"rope_parameters": NESTED}, {"rope_theta": 1e6})
        assert "rope_theta" in error.value.reasons[0]

    def test_both_forms_that_contradict_each_other(self):
        changed = override_rope({}, {"rope_parameters": LLAMA3, "rope_theta": 7.0})
        with pytest.raises(UserError, match="contradicts itself"):
            with_earlier_keys(changed)
