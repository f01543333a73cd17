"""Weights as mlx-lm loads them, in the type that vLLM asks for."""

import json
import shutil

import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten

from tests.tiny_models import save_checkpoint, tiny_model
from vllm_metal.errors import UserError
from vllm_metal.model_loader import load_model, mlx_dtype, weight_bytes


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
    model = load_model(make_config(dtype=dtype).model_config)
    weights = [array for _, array in tree_flatten(model.parameters())]
    assert {array.dtype for array in weights} == {mlx_dtype(dtype)}
    assert not model.training
    reference = tiny_model("llama")
    reference.set_dtype(mlx_dtype(dtype))
    token_ids = mx.array([[5, 4, 3]])
    assert mx.array_equal(model(token_ids), reference(token_ids))


def test_bytes_of_the_weights(make_config):
    model = tiny_model("llama")
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(load_model(make_config(dtype="float32").model_config)) == 4 * count
    assert weight_bytes(load_model(make_config(dtype="float16").model_config)) == 2 * count


def test_a_folder_without_weights(make_config, checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    config = make_config(model=str(tmp_path)).model_config
    with pytest.raises(UserError, match="mlx-lm cannot load") as error:
        load_model(config)
    assert str(tmp_path) in str(error.value)


def test_a_model_type_that_mlx_lm_does_not_know(make_config, checkpoint, tmp_path):
    """vLLM's configuration is made before; the file changes under it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = make_config(model=str(folder)).model_config
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "never_heard_of"}))
    with pytest.raises(UserError, match="never_heard_of"):
        load_model(config)


def test_weights_of_another_shape(make_config, tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    config = make_config(model=str(folder)).model_config
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
    with pytest.raises(UserError, match="mlx-lm cannot load"):
        load_model(config)
