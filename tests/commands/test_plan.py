"""`vllm-metal plan`: the table from the config file alone."""

import argparse
import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import config_of, save_checkpoint, save_tokenizer
from vllm_metal.commands import plan
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.selection import neutral_constants
from vllm_metal.model import model_loader
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.model_pages import ModelPages


@pytest.fixture
def folder(tmp_path):
    """A model folder with nothing in it but the config."""
    config = config_of("llama", head_dim=64, num_key_value_heads=2, num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def run(folder, *arguments):
    parser = argparse.ArgumentParser()
    plan.configure(parser)
    args = parser.parse_args([str(folder), *arguments])
    return args.run(args)


def test_the_table_needs_no_weights(folder, capsys):
    assert run(folder, "--memory", "1GiB", "--json") == 0
    formats = json.loads(capsys.readouterr().out)["formats"]
    rows = {(row["k_quant"], row["v_quant"]): row for row in formats}
    dense = rows["dense", "float16"]
    assert dense["bytes_per_request"] == 8192 * 3 * 2 * (64 + 64) * 2
    default = rows["q8_0", "q3_0"]
    assert default["bytes_per_request"] == 8192 * 3 * 2 * 92
    assert default["ratio"] == pytest.approx(256 / 92, abs=1e-3)
    assert default["tokens"] / dense["tokens"] == pytest.approx(256 / 92, rel=0.01)


def test_more_bytes_never_mean_more_tokens(folder, capsys):
    run(folder, "--memory", "1GiB", "--json")
    formats = json.loads(capsys.readouterr().out)["formats"]
    tokens = [row["tokens"] for row in sorted(formats, key=lambda row: row["bits_per_element"])]
    assert tokens == sorted(tokens, reverse=True)


def test_text_table_has_a_line_for_every_pair(folder, capsys):
    run(folder, "--memory", "2GiB", "--max-model-len", "1000")
    lines = capsys.readouterr().out.splitlines()
    assert "x 1,000" in lines[3]
    assert len(lines) == 4 + 1 + len(plan.SHOWN_PAIRS)


def test_weights_that_leave_no_room_are_an_error_with_the_sum(folder):
    with pytest.raises(UserError, match="workspace 512.00 MiB"):
        run(folder, "--memory", "256MiB")


@pytest.mark.parametrize("model_type", ["gemma3_text", "jamba", "falcon_h1"])
def test_layers_that_share_memory_are_planned_as_the_server_does(tmp_path, model_type, capsys):
    """The figures of a worker that is given these bytes; not the ratio of attention layers."""
    changes = {"head_dim": 64}
    if model_type == "gemma3_text":
        changes = {"architectures": ["Gemma3ForCausalLM"]}
    folder = save_checkpoint(tmp_path / "model", model_type, **changes)
    save_tokenizer(folder)
    run(folder, "--memory", "1GiB", "--max-model-len", "128", "--json")
    planned = json.loads(capsys.readouterr().out)
    config = EngineArgs(
        str(folder),
        runner="generate",
        dtype="bfloat16",
        max_model_len=128,
        kv_cache_memory_bytes=planned["kv_cache_bytes"],
        additional_config={"turboquant": True, "k_quant": "q4_0", "v_quant": "q4_0"},
    ).create_engine_config()
    binding = ModelBinding(model_loader.load_structure(str(folder)))
    layers = binding.layers
    served = ModelPages.of(config, layers, binding.states, neutral_constants(layers))
    capacity = served.capacity(planned["kv_cache_bytes"], 128)
    [row] = [r for r in planned["formats"] if (r["k_quant"], r["v_quant"]) == ("q4_0", "q4_0")]
    assert row["tokens"] == capacity.tokens
    assert row["requests"] == pytest.approx(capacity.requests(128), abs=0.01)
    assert row["ratio"] == pytest.approx(served.ratio(128), abs=1e-3)
    if binding.states:
        assert row["ratio"] < 16 / row["bits_per_element"]


def test_a_model_that_turboquant_refuses_has_its_dense_line_and_the_reason(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_of("deepseek_v3")))
    assert run(tmp_path, "--memory", "1GiB") == 0
    text = capsys.readouterr().out
    assert "dense" in text and "q8_0" not in text
    assert "TurboQuant cannot compress this model" in text and "(MLA)" in text
    run(tmp_path, "--memory", "1GiB", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["formats"]) == 1 and "(MLA)" in facts["turboquant_refused"][0]


def test_a_model_without_keys_and_values(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_of("mamba")))
    assert run(tmp_path, "--memory", "1GiB") == 0
    text = capsys.readouterr().out
    assert "0 attention layers, 4 recurrent states" in text
    assert "it has no keys and values" in text


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 << 30), ("1.5g", 3 << 29), ("512MB", 512 << 20), ("2048", 2048)],
)
def test_sizes(text, size):
    assert plan.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12XB", "1.2.3G"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        plan.parse_size(text)
