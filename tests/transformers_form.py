"""`config.json` as transformers 5 writes it, of tiny models of every type that transformers knows.

The source of truth is the transformers that is installed: a configuration with the keys of before
is read by its class and saved again.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_architectures
from mlx_lm.utils import load_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vllm_metal.model.checkpoint_config import transformers_class

THETA = 654321.0
"""No type's default."""
LOCAL_THETA = 23456.0
"""The same, in sliding windows."""

SCALINGS: dict[str, dict[str, Any] | None] = {
    "unscaled": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}

_WINDOWS = ["sliding_attention", "full_attention"] * 2
_NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": THETA},
    "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
}
_PARTIAL = {
    "full_attention": {**_NESTED["full_attention"], "partial_rotary_factor": 0.5},
    "sliding_attention": {**_NESTED["sliding_attention"], "partial_rotary_factor": 1.0},
}
_PROPORTIONAL = {
    **_NESTED,
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": THETA,
        "partial_rotary_factor": 0.25,
    },
}
_LLAMA4 = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
_FLAT = {"rope_type": "default", "rope_theta": THETA}

_GIVEN: dict[str, dict[str, Any]] = {
    "apertus": {"rope_scaling": SCALINGS["llama3"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "exaone4": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"rope_local_base_freq": LOCAL_THETA},
    "gemma3_text": {"rope_local_base_freq": LOCAL_THETA},
    "gemma3n": {"rope_local_base_freq": LOCAL_THETA},
    "gemma4": {"rope_parameters": _PROPORTIONAL},
    "gemma4_text": {"rope_parameters": _PROPORTIONAL},
    "glm": {"partial_rotary_factor": 1.0},
    "glm_moe_dsa": {"rope_parameters": _FLAT},
    "gpt_neox": {"rotary_emb_base": 54321, "rotary_pct": 0.5},
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "laguna": {"rope_parameters": _PARTIAL},
    "mamba2": {"num_heads": 8, "intermediate_size": 256},
    "mellum": {"rope_parameters": _NESTED},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 1],
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
        "sliding_window": 8,
        "swa_rope_theta": LOCAL_THETA,
        "rope_parameters": {k: {**v, "partial_rotary_factor": 0.5} for k, v in _NESTED.items()},
    },
    "minimax_m3_vl": {"rotary_dim": 16, "partial_rotary_factor": 0.5},
    "ministral3": {
        "rope_parameters": {**_FLAT, **_LLAMA4},
        "layer_types": None,
        "sliding_window": None,
    },
    "mistral4": {"rope_parameters": {**_FLAT, **_LLAMA4}},
    "olmo3": {"rope_theta": 500000.0},
    "qwen3_5": {"rope_parameters": {**_FLAT, "partial_rotary_factor": 0.25}},
    "qwen3_5_moe": {"rope_parameters": {**_FLAT, "partial_rotary_factor": 0.25}},
    "recurrent_gemma": {"rope_theta": 10000.0},
    "step3p5": {
        "attention_other_setting": {"num_attention_heads": 2, "num_attention_groups": 2},
        "moe_layers_enum": "1,3",
        "yarn_only_types": ["full_attention"],
    },
}
"""What the tiny configurations lack, by architecture; in `text_config` where there is one."""

_LACKED = {
    "head_dim": ["glm4_moe_lite"],
    "rope_theta": (
        "dbrx gemma4 gemma4_text glm_moe_dsa gpt2 gpt_bigcode gpt_neox gptj jamba laguna mamba "
        "mamba2 mellum ministral3 mistral4 muse_spark nemotron_h qwen3_5 qwen3_5_moe"
    ).split(),
}
"""Keys of the tiny configurations' common part, and the types that have none such."""

NOT_WRITTEN = {
    "kimi_k25": "its class is vLLM's own",
    "olmo": "mlx-lm's own model fails",
    "muse_glimmer": "its class adds a text_config of full size",
    "pixtral": "the class is that of the vision part alone",
}
"""Types of which transformers cannot write a tiny configuration."""

TYPES = tuple(
    name
    for name in tiny_architectures.ARCHITECTURES
    if tiny_architectures.config_of(name)["model_type"] in CONFIG_MAPPING_NAMES
    and name not in NOT_WRITTEN
)
"""Architectures of mlx-lm that transformers knows."""


def earlier_config(name: str, scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tiny configuration with the keys of before transformers 5."""
    config = copy.deepcopy(tiny_architectures.config_of(name))
    text = config.get("text_config", config)
    if "rope_theta" in text:
        text["rope_theta"] = THETA
    for key, names in _LACKED.items():
        if name in names:
            text.pop(key, None)
    text |= copy.deepcopy(_GIVEN.get(name, {}))
    if scaling is not None:
        _scale(text, scaling)
    return {
        key: value for key, value in config.items() if value is not None or key == "rope_scaling"
    }


def _scale(text: dict[str, Any], scaling: Mapping[str, Any]) -> None:
    """Puts a scaling where the configuration has its rotary embeddings."""
    if "rope_parameters" not in text:
        text["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
        return
    parameters = text["rope_parameters"]
    parameters.get("full_attention", parameters).update(scaling)


def as_transformers_writes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration, read and saved by transformers."""
    read_by = transformers_class(config["model_type"])
    assert read_by is not None
    read = read_by.from_dict(copy.deepcopy(dict(config)))
    with tempfile.TemporaryDirectory() as folder:
        read.save_pretrained(folder)
        return load_config(Path(folder))


def with_defaults_of(written: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The earlier configuration, with the defaults that transformers wrote for what it lacks."""
    merged = {k: v for k, v in written.items() if k != "rope_parameters"} | dict(config)
    text = config.get("text_config")
    if text is not None:
        defaults = {k: v for k, v in written["text_config"].items() if k != "rope_parameters"}
        merged["text_config"] = defaults | text
    return merged
