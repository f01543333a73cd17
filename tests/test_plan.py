"""`vllm-metal plan`: the table from the config file alone."""

import argparse
import json

import pytest

from tests.tiny_models import config_of
from vllm_metal import plan
from vllm_metal.errors import UserError


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
    assert dense["bytes_per_token"] == 3 * 2 * (64 + 64) * 2
    default = rows["q8_0", "q3_0"]
    assert default["bytes_per_token"] == 3 * 2 * 92
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
    assert len(lines) == 4 + 1 + len(plan.FORMAT_PAIRS)


def test_weights_that_leave_no_room_are_an_error_with_the_sum(folder):
    with pytest.raises(UserError, match="workspace 512.00 MiB"):
        run(folder, "--memory", "256MiB")


@pytest.mark.parametrize(
    ("model_type", "kind"), [("gemma3_text", "sliding windows"), ("jamba", "recurrent state")]
)
def test_models_whose_layers_share_memory_are_refused(tmp_path, model_type, kind):
    (tmp_path / "config.json").write_text(json.dumps(config_of(model_type)))
    with pytest.raises(UserError, match=f"has {kind}; the server prints its plan"):
        run(tmp_path, "--memory", "1GiB")


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
