"""Formats of weights that others write: right logits, or refused by the format's name."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_architectures
import torch
from mlx.utils import tree_flatten
from mlx_lm.models import bitlinear_layers

from tests.foreign_checkpoints import Case, checkpoints, is_expert, is_whole_expert, save_float
from tests.tiny_models import save_checkpoint
from tests.weight_files import (
    awq,
    bitnet,
    converted,
    fp8_blocks,
    fp8_tensor,
    gptq,
    int4_packed,
    is_projection,
    mxfp4_blocks,
    mxfp4_packed,
    mxfp8,
    nvfp4,
    nvfp4_experts,
    read_weights,
    write_weights,
)
from vllm_metal.errors import UserError
from vllm_metal.model import model_loader, weight_formats
from vllm_metal.model.model_loader import ModelSource, load_model

TOKENS = mx.array([[5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]])
BOUND = 1e-5
"""Largest difference of logits, in standard deviations of the logits."""

BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(name: str, **weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32} | weights
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups}


MIMO = {"n_shared_experts": None}
MINIMAX = {"model_type": "minimax_m2", "rotary_dim": 16}
DEEPSEEK = ("deepseek_v3", "joyai_llm_flash", "kimi_k2", "kimi_k25")

SERVED = [
    Case("awq", "llama", awq(), AWQ),
    Case("awq", "llama", awq(64), AWQ | {"group_size": 64}, label="64"),
    *(
        Case("awq", model, awq(), AWQ)
        for model in ("gemma3_text", "phi3", "qwen3_vl", "starcoder2")
    ),
    Case("bitnet", "llama", bitnet, BITNET | {"modules_to_not_convert": ["lm_head"]}),
    *(Case("fp8", "deepseek_v3", fp8_blocks(), FP8, model_type=name) for name in DEEPSEEK),
    Case("fp8", "deepseek_v3", fp8_blocks(), FP8 | {"scale_fmt": "ue8m0"}, label="powers of two"),
    Case("fp8", "deepseek_v32", fp8_blocks(), FP8),
    Case("fp8", "glm_moe_dsa", fp8_blocks(), FP8),
    Case("fp8", "mimo_v2_flash", fp8_blocks(), FP8, changes=MIMO),
    Case("fp8", "minimax", fp8_blocks(), FP8, model_type="minimax", changes=MINIMAX),
    Case("fp8", "minimax", fp8_blocks(), FP8, model_type="minimax_m2", changes=MINIMAX),
    Case("fp8", "mistral4", fp8_blocks(), FP8),
    Case("fp8", "mistral4", fp8_tensor(), FP8 | {"weight_block_size": None}, label="tensor"),
    Case("mxfp4", "gpt_oss", mxfp4_blocks, {"quant_method": "mxfp4"}, is_whole_expert),
    Case("mxfp8", "minimax_m3_vl", mxfp8, {"quant_method": "mxfp8"}),
    *(
        Case(
            "compressed-tensors pack-quantized",
            "deepseek_v3",
            int4_packed(),
            compressed("pack-quantized"),
            is_expert,
            model_type=name,
        )
        for name in DEEPSEEK
    ),
    Case(
        "compressed-tensors pack-quantized",
        "mistral4",
        int4_packed(),
        compressed("pack-quantized"),
        lambda name: is_projection(name) and "kv_b_proj" not in name,
    ),
    Case(
        "compressed-tensors mxfp4-pack-quantized",
        "kimi_k3",
        mxfp4_packed,
        compressed("mxfp4-pack-quantized"),
        is_expert,
    ),
]
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
MUSE_SPARK = Case("modelopt NVFP4", "muse_spark", nvfp4_experts, NVFP4, is_whole_expert)
"""Its weights are compared and not its logits: mlx-lm's model needs Metal."""

REFUSED = [
    (Case("gptq", "llama", gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32}), "gptq"),
    (
        Case("gptq", "llama", gptq(g_idx=False), {"quant_method": "gptq", "bits": 4}, label="no"),
        "format gptq are not served (served: MLX's own, awq",
    ),
    (Case("awq", "llama", awq(), AWQ | {"bits": 8}, label="8"), "bits is 8 (served: 4)"),
    (Case("awq", "llama", awq(16), AWQ | {"group_size": 16}, label="16"), "group_size is 16"),
    (Case("awq", "llama", awq(), AWQ | {"version": "gemv"}, label="gemv"), "version is gemv"),
    (Case("awq", "qwen3_moe", awq(), AWQ), "the experts are quantised"),
    (Case("fp8", "llama", fp8_blocks(), FP8), "fp8 are not served for llama (served: deepseek_v3"),
    (
        Case("fp8", "deepseek_v3", fp8_blocks(64), FP8 | {"weight_block_size": [64, 64]}),
        "weight_block_size is [64, 64] (served: [128, 128])",
    ),
    (
        Case("fp8", "deepseek_v3", fp8_tensor(), FP8 | {"weight_block_size": None}, label="tensor"),
        "weight_block_size is None",
    ),
    (
        Case("fp8", "deepseek_v3", fp8_blocks(128, torch.float8_e8m0fnu), FP8, label="e8m0"),
        "scales have the type F8_E8M0",
    ),
    (
        Case("fp8", "ministral3", fp8_tensor(), FP8 | {"weight_block_size": None}),
        "fp8 are not served for ministral3",
    ),
    (Case("mxfp4", "llama", mxfp4_packed, {"quant_method": "mxfp4"}), "served: gpt_oss"),
    (Case("mxfp8", "llama", mxfp8, {"quant_method": "mxfp8"}), "served: minimax_m3_vl"),
    (
        Case("compressed", "llama", int4_packed(), compressed("pack-quantized")),
        "compressed-tensors pack-quantized are not served for llama",
    ),
    (
        Case("compressed", "deepseek_v3", int4_packed(), compressed("pack-quantized", num_bits=8)),
        "num_bits is 8 (served: 4)",
    ),
    (
        Case("compressed", "deepseek_v3", int4_packed(), compressed("pack-quantized"), label="kv"),
        "kv_b_proj.weight_packed would be quantised a second time",
    ),
    (
        Case("compressed", "llama", fp8_tensor("_scale"), compressed("float-quantized")),
        "compressed-tensors float-quantized are not served",
    ),
    (
        Case(
            "compressed",
            "llama",
            nvfp4("_packed", "_scale", "_global_scale", inverse=True),
            compressed("nvfp4-pack-quantized"),
            label="nvfp4",
        ),
        "compressed-tensors nvfp4-pack-quantized are not served",
    ),
    (
        Case(
            "modelopt",
            "llama",
            nvfp4("", "_scale", "_scale_2", inverse=False),
            NVFP4,
        ),
        "modelopt NVFP4 are not served for llama",
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Gives the float checkpoint of a case; made once."""
    made: dict[str, Path] = {}

    def make(case: Case) -> Path:
        key = case.model + json.dumps(case.changes)
        if key not in made:
            made[key] = save_float(tmp_path_factory.mktemp(case.model), case)
        return made[key]

    return make


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_logits_are_those_of_the_numbers(case, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bitlinear_layers.BitLinear, "execute_matmul_kernel", tiny_architectures._ternary_product
    )
    monkeypatch.setattr(model_loader, "can_run_metal", lambda: True)
    quantised, exact = checkpoints(case, folders(case), tmp_path)
    model = load_model(ModelSource(str(quantised)), "float32")
    found, expected = logits(model), logits(load_model(ModelSource(str(exact)), "float32"))
    assert np.abs(found - expected).max() < BOUND * expected.std()
    packed = any(a.dtype in (mx.uint32, mx.uint8) for _, a in tree_flatten(model.parameters()))
    assert packed == weight_formats.SERVED[case.format].memory.startswith("packed")


def test_the_weights_of_a_model_that_needs_metal(folders, tmp_path):
    quantised, exact = checkpoints(MUSE_SPARK, folders(MUSE_SPARK), tmp_path)
    expected = dict(load_model(ModelSource(str(exact)), "float32").named_modules())
    compared = 0
    for name, module in load_model(ModelSource(str(quantised)), "float32").named_modules():
        if "scales" not in module:
            continue
        compared += 1
        numbers = mx.dequantize(
            module.weight,
            module.scales,
            group_size=16,
            bits=4,
            mode="nvfp4",
            dtype=mx.float32,
        )
        numbers = numbers * module.global_scale.reshape(-1, 1, 1) / (6 * 448)
        assert np.allclose(np.array(numbers), np.array(expected[name].weight), rtol=1e-5, atol=0)
    assert compared == 12  # three projections in each of four layers


def test_every_format_and_every_type_has_a_case():
    cases = [*SERVED, MUSE_SPARK]
    shown = {(case.format, case.model_type or case.model) for case in cases}
    for name, known in weight_formats.SERVED.items():
        if known.model_types == weight_formats.ANY:
            assert any(case.format == name for case in cases), name
        else:
            assert {(name, model_type) for model_type in known.model_types} <= shown


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_other_weights_are_refused_by_the_name_of_their_format(case, words, folders, tmp_path):
    quantised, _ = checkpoints(case, folders(case), tmp_path)
    with pytest.raises(UserError, match="cannot be served") as error:
        load_model(ModelSource(str(quantised)), "float32")
    [reason] = error.value.reasons
    assert words in reason
    assert "served" in reason and weight_formats.REMEDY in reason


def test_ternary_weights_on_another_device_than_metal(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(model_loader, "can_run_metal", lambda: False)
    [case] = [case for case in SERVED if case.format == "bitnet"]
    quantised, _ = checkpoints(case, folders(case), tmp_path)
    with pytest.raises(UserError, match="on this device") as error:
        load_model(ModelSource(str(quantised)), "float32")
    assert "_proj has ternary weights (bitnet)" in error.value.reasons[0]


@pytest.mark.parametrize(
    "method",
    ["aqlm", "auto-round", "bitsandbytes", "eetq", "fbgemm_fp8", "hqq", "quark", "torchao"],
)
def test_methods_that_mlx_lm_does_not_know(method):
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    reason = weight_formats.refusal(config)
    assert method.replace("_", "-") in reason and "MLX's own" in reason


@pytest.mark.parametrize("left", [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}])
def test_mlxs_own_format_with_what_is_left_of_another(left, tmp_path):
    """Some converters leave the `quantization_config` of the checkpoint that they converted."""
    folder = save_checkpoint(tmp_path / "model", quantization={"group_size": 32, "bits": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": left}))
    own = save_checkpoint(tmp_path / "own", quantization={"group_size": 32, "bits": 4})
    expected = logits(load_model(ModelSource(str(own)), "float32"))
    assert np.array_equal(logits(load_model(ModelSource(str(folder)), "float32")), expected)


def test_codes_without_scales_are_no_numbers(tmp_path):
    """As a file would have them whose config.json names no format."""
    folder = save_checkpoint(tmp_path / "model")
    weights = read_weights(folder)
    stored, _ = converted(weights, fp8_tensor(), is_projection)
    write_weights(folder, {name: t for name, t in stored.items() if "scale" not in name})
    with pytest.raises(UserError, match="mlx-lm cannot load") as error:
        load_model(ModelSource(str(folder)), "float32")
    assert "uint8 and no scales" in error.value.reasons[0]


def test_the_types_of_the_tensors_of_all_files(tmp_path):
    for i in (1, 2):
        file = tmp_path / f"model-0000{i}-of-00002.safetensors"
        mx.save_safetensors(str(file), {f"a{i}": mx.zeros(3), f"b{i}": mx.zeros(2, mx.uint8)})
    assert weight_formats.tensor_types(tmp_path) == {
        "a1": "F32",
        "b1": "U8",
        "a2": "F32",
        "b2": "U8",
    }
