"""The size of weights that are not there yet is what they take when they are."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from tests.tiny_models import save_checkpoint
from vllm_metal.model.model_loader import ModelSource, load_structure
from vllm_metal.model.weight_size import INDEX, weight_size

QUANTIZATIONS = [
    None,
    {"group_size": 32, "bits": 4},
    {"group_size": 64, "bits": 8},
    {"group_size": 32, "bits": 3},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]


def size_of(folder):
    source = ModelSource(str(folder))
    return weight_size(folder, load_structure(source), source.config().for_mlx_lm)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_config_alone_says_what_the_arrays_take(tmp_path, name, quantization):
    """Those of the checkpoint, in 16 bits where they are not quantised."""
    folder = save_checkpoint(tmp_path / "model", name, quantization=quantization)
    arrays = {}
    for file in folder.glob("*.safetensors"):
        arrays |= mx.load(str(file))
        file.unlink()
    arrays = tree_map(
        lambda x: x.astype(mx.bfloat16) if mx.issubdtype(x.dtype, mx.floating) else x, arrays
    )
    (folder / INDEX).unlink(missing_ok=True)
    found = size_of(folder)
    assert found.bytes == sum(array.nbytes for array in arrays.values())
    assert found.source == "its config.json"


def test_a_layer_that_is_quantised_otherwise(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    sizes = []
    for own in ({}, {"lm_head": False}, {"lm_head": {"group_size": 32, "bits": 8}}):
        config["quantization"] = {"group_size": 32, "bits": 4, **own}
        (folder / "config.json").write_text(json.dumps(config))
        sizes.append(size_of(folder).bytes)
    head = config["vocab_size"] * config["hidden_size"]
    assert sizes[1] - sizes[0] == head * 2 - (head // 2 + head // 32 * 4)
    assert sizes[2] - sizes[0] == head // 2


def test_files_count_first_and_then_the_index(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 12345}}))
    assert (size_of(folder).bytes, size_of(folder).source) == (on_disk, "its files")
    (folder / "model.safetensors").unlink()
    assert (size_of(folder).bytes, size_of(folder).source) == (12345, f"its {INDEX}")
    shutil.rmtree(folder)
