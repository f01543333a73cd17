"""`vllm-metal eval` end to end on a little of the demo model."""

import argparse
import json

import pytest

from vllm_metal.errors import UserError
from vllm_metal.evaluation import command


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


def test_table_json_and_plot(demo_model, tmp_path, capsys):
    size = ("--windows", "1", "--window-tokens", "48", "--no-needles", "--long-window-tokens", "64")
    output, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    arguments = ("--pairs", "q8_0/q8_0", "q3_0/q2_0", "--block-affine", "8/3")
    assert run(demo_model, *arguments, *size, "--output", output, "--plot", picture) == 0
    figures = json.loads(output.read_text())
    pairs = figures["pairs"]
    assert list(pairs) == ["q8_0/q8_0", "q3_0/q2_0", "block-affine 8/3"]
    assert pairs["q8_0/q8_0"]["kld"] < pairs["q3_0/q2_0"]["kld"]
    for figure in ("attention_error", "long_window_kld", "decode_kld"):
        assert 0 < pairs["q8_0/q8_0"][figure] < pairs["q3_0/q2_0"][figure] / 4
    assert pairs["q8_0/q8_0"]["ratio"] == pytest.approx(16 / 8.25)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(name in table for name in pairs)


def test_an_unknown_pair_is_named_with_what_is_allowed(demo_model):
    with pytest.raises(UserError, match="q9_0.*allowed: q2_0"):
        run(demo_model, "--pairs", "q9_0/q3_0")


def test_a_short_text_is_an_error(demo_model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(UserError, match="tokens; 6000 are needed"):
        run(demo_model, "--text", text)
