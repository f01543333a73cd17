"""Tiny checkpoints that transformers 5 saves: its config.json and its names of weights."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.transformers_form import earlier_config
from vllm_metal.model.checkpoint_config import transformers_class

_WITHOUT_HEAD_DIM = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "mistral4")
"""MLA: transformers takes the size of a head from the sizes of its parts."""


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
"""The sizes of a vision part."""

_VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vision_config": {
            **_TOWER,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "minimax_m3_vl": {
        "merged_hidden_size": 32,
        "projector_hidden_size": 48,
        "vision_config": {
            **_TOWER,
        },
    },
    "mistral3": {
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "pixtral",
            **_TOWER,
            "patch_size": 14,
            "head_dim": 16,
        },
    },
    "qwen3_vl": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
}
"""Vision parts as small as the language models; those that transformers adds are of full size."""


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' model of a tiny configuration, with random weights large enough to matter.

    Args:
        name: of the architecture, as in `tiny_architectures`.
        changes: settings of the language model in place of those.
    """
    config = copy.deepcopy(earlier_config(name))
    text = config.get("text_config", config)
    if name in _WITHOUT_HEAD_DIM:
        text.pop("head_dim", None)
    text |= changes
    config |= copy.deepcopy(_VISION.get(name, {}))
    if "model_type" in changes:
        config["model_type"] = changes["model_type"]
    read_by = transformers_class(config["model_type"])
    assert read_by is not None
    read = read_by.from_dict(config)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(read.get_text_config(), key, None) is not None:
            setattr(read.get_text_config(), key, 0)
    torch.manual_seed(0)
    vision = "text_config" in config or name in ("mistral4",)
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = kind.from_config(read, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(folder: Path, name: str, **changes: Any) -> Path:
    """Saves `make_model` as a checkpoint; returns the folder."""
    make_model(name, **changes).save_pretrained(folder)
    return folder
