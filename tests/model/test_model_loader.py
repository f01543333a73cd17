"""Weights as mlx-lm loads them, in the type that vLLM asks for."""

import json
import shutil
import sys

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from mlx.utils import tree_flatten

from tests.tiny_models import save_checkpoint, tiny_model
from vllm_metal.errors import UserError
from vllm_metal.model import model_loader
from vllm_metal.model.model_loader import (
    ModelSource,
    load_model,
    load_structure,
    load_tokenizer,
    mlx_dtype,
    weight_bytes,
)


def load(config):
    """The model of vLLM's configuration, as the worker loads it."""
    model = config.model_config
    return load_model(ModelSource.of(model), model.dtype, max_model_len=model.max_model_len)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (torch.float32, mx.float32),
        (torch.bfloat16, mx.bfloat16),
        ("float16", mx.float16),
        ("bfloat16", mx.bfloat16),
    ],
    ids=str,
)
def test_types_by_torchs_names(name, dtype):
    assert mlx_dtype(name) == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_models_logits(make_config, dtype):
    model = load(make_config(dtype=dtype))
    weights = [array for _, array in tree_flatten(model.parameters())]
    assert {array.dtype for array in weights} == {mlx_dtype(dtype)}
    assert not model.training
    reference = tiny_model("llama")
    reference.set_dtype(mlx_dtype(dtype))
    token_ids = mx.array([[5, 4, 3]])
    assert mx.array_equal(model(token_ids), reference(token_ids))


QUANTIZATIONS = [
    {"group_size": 32, "bits": 4},
    {"group_size": 32, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantised_weights_stay_quantised(make_config, tmp_path, quantization, dtype):
    folder = save_checkpoint(tmp_path / "model", quantization=quantization)
    model = load(make_config(model=str(folder), dtype=dtype))
    own, _ = mlx_lm.utils.load_model(folder)
    for (path, array), (_, expected) in zip(
        tree_flatten(model.parameters()), tree_flatten(own.parameters()), strict=True
    ):
        if expected.dtype in (mx.uint8, mx.uint32):
            assert mx.array_equal(array, expected), path
        else:
            assert array.dtype == mlx_dtype(dtype), path
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.uint32
    token_ids = mx.array([[5, 4, 3]])
    logits, expected = model(token_ids), own(token_ids)
    assert logits.dtype == mlx_dtype(dtype)
    difference = mx.abs(logits - expected).max() / mx.std(expected)
    assert difference.item() < (1e-5 if dtype == "float32" else 0.3)


def test_what_a_model_excepts_keeps_its_type(make_config, tmp_path):
    """The biases that choose experts, to which 8 bits of a mantissa are too few."""
    architecture = {"architectures": ["DeepseekV3ForCausalLM"], "rope_scaling": None}
    folder = save_checkpoint(tmp_path / "model", "deepseek_v3", **architecture)
    model = load(make_config(model=str(folder), dtype="bfloat16"))
    kinds = {path: array.dtype for path, array in tree_flatten(model.parameters())}
    biases = [path for path in kinds if "e_score_correction_bias" in path]
    assert biases and all(kinds.pop(path) == mx.float32 for path in biases)
    assert set(kinds.values()) == {mx.bfloat16}


def test_bytes_of_the_weights(make_config):
    model = tiny_model("llama")
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(load(make_config(dtype="float32"))) == 4 * count
    assert weight_bytes(load(make_config(dtype="float16"))) == 2 * count


def test_a_folder_without_weights(make_config, checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    config = make_config(model=str(tmp_path))
    with pytest.raises(UserError, match="mlx-lm cannot load") as error:
        load(config)
    assert str(tmp_path) in str(error.value)


def test_a_model_type_that_mlx_lm_does_not_know(make_config, checkpoint, tmp_path):
    """vLLM's configuration is made before; the file changes under it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = make_config(model=str(folder))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "never_heard_of"}))
    with pytest.raises(UserError, match="never_heard_of"):
        load(config)


def test_a_model_whose_code_needs_another_package(monkeypatch, checkpoint, tmp_path):
    """mlx-lm's module ends the process where it cannot import it."""
    for module in ("hf_olmo", "mlx_lm.models.olmo"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "olmo"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mlx-lm cannot load") as error:
        load_structure(ModelSource(str(tmp_path)))
    assert error.value.reasons == ["its code needs the package hf_olmo, which is not installed"]


def test_weights_of_another_shape(make_config, tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    config = make_config(model=str(folder))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
    with pytest.raises(UserError, match="mlx-lm cannot load"):
        load(config)


def test_a_tokenizer(demo_model):
    tokenizer = load_tokenizer(str(demo_model))
    assert tokenizer.decode(tokenizer.encode("in 1889", add_special_tokens=False)) == "in 1889"


def test_a_folder_without_a_tokenizer(checkpoint):
    with pytest.raises(UserError, match="cannot load the tokenizer of .*llama") as error:
        load_tokenizer(str(checkpoint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (OSError(), "OSError"),
        (ValueError("not a name"), "not a name"),
        (OSError("no route\nto host"), "no route"),
    ],
)
@pytest.mark.parametrize(
    "what", [load_tokenizer, lambda name: load_model(ModelSource(name), "float32")]
)
def test_a_name_that_the_hub_does_not_give(monkeypatch, raised, shown, what):
    def download(*_, **__):
        raise raised

    monkeypatch.setattr(model_loader, "snapshot_download", download)
    with pytest.raises(UserError, match="'some/model' is not a local folder and could") as error:
        what("some/model")
    assert error.value.reasons == [shown]


def test_a_revision_is_asked_for(monkeypatch, checkpoint):
    asked = []

    def download(model, revision, allow_patterns):
        asked.append((model, revision))
        return str(checkpoint)

    monkeypatch.setattr(model_loader, "snapshot_download", download)
    load_model(ModelSource("some/model", "v2"), "float32")
    load_structure(ModelSource("some/model", "v3"))
    assert asked == [("some/model", "v2"), ("some/model", "v3")]


def test_a_key_of_the_config_file_that_is_missing(make_config, tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    del settings["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="mlx-lm cannot load") as error:
        load_model(ModelSource(str(folder)), "float32")
    assert error.value.reasons == ["config.json lacks 'rms_norm_eps'"]


def test_what_the_file_says_in_transformers_5(make_config, tmp_path):
    """The model of before, whose file has the earlier keys."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": 64}
    folder = save_checkpoint(tmp_path / "model", rope_theta=500000.0, rope_scaling=scaling)
    expected = load(make_config(model=str(folder)))
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"] = settings.pop("rope_scaling") | {
        "rope_theta": settings.pop("rope_theta")
    }
    (folder / "config.json").write_text(json.dumps(settings))
    token_ids = mx.array([[5, 4, 3, 7, 8, 9, 1, 2]])
    logits = load(make_config(model=str(folder)))(token_ids)
    assert mx.array_equal(logits, expected(token_ids))
    assert not mx.allclose(logits, tiny_model("llama")(token_ids))


def test_a_scaling_that_mlx_lm_ignores_is_refused(make_config, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    # vLLM imports the class of an architecture, and Llama's is imported already
    folder = save_checkpoint(
        tmp_path, "qwen3_moe", architectures=["LlamaForCausalLM"], rope_scaling=scaling
    )
    with pytest.raises(UserError, match="would not compute what config.json says"):
        load(make_config(model=str(folder)))


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ({"rms_norm_eps": 0.1}, {"rms_norm_eps": 0.1}),
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
    ],
    ids=str,
)
def test_overrides_are_those_of_the_file(make_config, checkpoint, overrides, changes):
    """mlx-lm gets what vLLM's `--hf-overrides` changes, as if it stood in `config.json`."""
    if "num_hidden_layers" in overrides:  # the weights have three
        structure = load_structure(ModelSource(str(checkpoint), hf_overrides=overrides))
        assert len(structure.layers) == 2
        return
    model = load(make_config(hf_overrides=overrides))
    token_ids = mx.array([[5, 4, 3, 7, 8, 9, 1, 2]])
    expected = tiny_model("llama", **changes)(token_ids)
    assert mx.array_equal(model(token_ids), expected)
    assert not mx.allclose(expected, tiny_model("llama")(token_ids))


@pytest.mark.parametrize("with_own", [True, False])
def test_a_config_file_at_another_place(make_config, tmp_path, with_own):
    """`--hf-config-path`: nothing of the model's own file is read, if there is one."""
    folder = save_checkpoint(tmp_path / "model", rope_scaling={"type": "linear", "factor": 4.0})
    other = save_checkpoint(tmp_path / "other", rope_theta=1e6)
    if not with_own:
        (folder / "config.json").unlink()
    model = load(make_config(model=str(folder), hf_config_path=str(other)))
    token_ids = mx.array([[5, 4, 3, 7, 8, 9, 1, 2]])
    assert mx.array_equal(model(token_ids), tiny_model("llama", rope_theta=1e6)(token_ids))


def test_the_files_settings_stay_as_they_were(checkpoint):
    """mlx-lm's models of some types change the dictionary that they are made of."""
    overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    before = json.dumps(overrides)
    load_structure(ModelSource(str(checkpoint), hf_overrides=overrides))
    assert json.dumps(overrides) == before
