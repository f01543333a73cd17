"""`vllm-metal eval` end to end on a little of the demo model."""

import argparse
import json

import pytest

from vllm_metal.errors import UserError
from vllm_metal.evaluation import command
from vllm_metal.model import model_loader


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


@pytest.mark.nightly
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


WRONG = {
    "--pairs q9_0/q3_0": "q9_0.*allowed: q2_0",
    "--block-affine 8/7": "--block-affine 8/7",
    "--windows 0": "--windows 0",
    "--text missing.txt": "--text 'missing.txt'",
    "--output missing/figures.json": "--output 'missing/figures.json'",
}


@pytest.fixture
def no_model(monkeypatch):
    """A model that is asked for fails the test."""
    for load in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(model_loader, load, lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(arguments, no_model):
    with pytest.raises(UserError, match=WRONG[arguments]):
        run("some/model", *arguments.split())


def test_an_unknown_device_is_refused(monkeypatch, no_model):
    monkeypatch.setenv("VLLM_METAL_DEVICE", "nonsense")
    with pytest.raises(UserError, match="VLLM_METAL_DEVICE='nonsense' is not known"):
        run("some/model")


def test_no_model_in_a_folder_and_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        run(tmp_path)
    with pytest.raises(UserError, match="is not a local folder"):
        run(tmp_path / "missing")


def test_a_revision_and_trust_reach_the_loader(monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        raise UserError("enough")

    monkeypatch.setattr(model_loader, "load_model", load)
    monkeypatch.setattr(model_loader, "load_tokenizer", lambda *arguments: asked.append(arguments))
    with pytest.raises(UserError, match="enough"):
        run("some/model", "--revision", "v2", "--trust-remote-code")
    source = model_loader.ModelSource("some/model", "v2", trust_remote_code=True)
    assert asked == [("some/model", "v2", True), (source, "float32")]


def test_a_short_text_is_an_error(demo_model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(UserError, match="tokens; needed: .*6000 for the long window"):
        run(demo_model, "--text", text)
