"""The arguments of `vllm-metal eval`: the study they ask for, and one line for what is wrong."""

import argparse

import pytest

from vllm_metal.errors import UserError
from vllm_metal.evaluation import command
from vllm_metal.evaluation.arguments import read_text, study_of
from vllm_metal.evaluation.fidelity import MIN_WINDOW_TOKENS
from vllm_metal.evaluation.needle import HAYSTACKS
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(["some/model", *arguments])


def test_defaults():
    study = study_of(parse())
    assert tuple(study.pairs) == SHOWN_PAIRS and study.block_affine == []
    assert study.haystacks == HAYSTACKS
    with pytest.raises(UserError, match=f"{max(HAYSTACKS)} for the needle test"):
        study.require(max(HAYSTACKS) - 1)


def test_every_argument_is_heard():
    least = str(MIN_WINDOW_TOKENS)
    sizes = ("--windows", "1", "--window-tokens", least, "--long-window-tokens", "0")
    formats = ("--pairs", "uint4/q2_0", "--block-affine", "8/3", "2/8")
    study = study_of(parse(*sizes, *formats, "--max-model-len", "1", "--no-needles"))
    assert list(map(str, study.pairs)) == ["uint4/q2_0"]
    assert study.block_affine == [(8, 3), (2, 8)]
    assert (study.windows, study.window_tokens, study.long_window_tokens) == (1, int(least), 0)
    assert study.max_model_len == 1 and study.haystacks == ()


BITS = "allowed: keys 2, 3, 4, 5, 6, 7, 8; values 2, 3, 4, 5, 6, 8"
WRONG = {
    "--windows 0": "--windows 0 is not allowed (allowed: 1 or more)",
    "--windows -1": "--windows -1 is not allowed (allowed: 1 or more)",
    "--window-tokens 23": "--window-tokens 23 is not allowed (allowed: 24 or more)",
    "--long-window-tokens 9": "--long-window-tokens 9 is not allowed (allowed: 0 or 24 or more)",
    "--max-model-len 0": "--max-model-len 0 is not allowed (allowed: 1 or more)",
    "--block-affine 8/7": f"--block-affine 8/7: '8/7' is not KEYS/VALUES in bits; {BITS}",
    "--block-affine x/y": f"--block-affine x/y: 'x/y' is not KEYS/VALUES in bits; {BITS}",
    "--block-affine 8/3 1/3": f"--block-affine 8/3 1/3: '1/3' is not KEYS/VALUES in bits; {BITS}",
    "--pairs q8_0": "--pairs q8_0: 'q8_0' is not KEYS/VALUES, e.g. q8_0/q3_0",
    "--pairs q8_0/q9_0": "--pairs q8_0/q9_0: v_quant is 'q9_0'; allowed: q2_0, q3_0, q4_0",
    "--pairs q8_0/q3_0/q3_0": "v_quant is 'q3_0/q3_0'; allowed: q2_0",
    "--pairs /q3_0": "k_quant is ''; allowed: q2_0",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_said_in_one_line(arguments):
    option, *values = arguments.split()
    if values[0].startswith("-"):
        option, values = f"{option}={values[0]}", []
    with pytest.raises(UserError) as error:
        study_of(parse(option, *values))
    assert WRONG[arguments] in str(error.value)
    assert "\n" not in str(error.value)


def test_texts(tmp_path):
    assert len(read_text(None)) > 100_000
    file = tmp_path / "text.txt"
    with pytest.raises(UserError, match="--text .*text.txt' cannot be read"):
        read_text(file)
    file.write_bytes("grün".encode())
    assert read_text(file) == "grün"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--text .*text.txt' cannot be read"):
        read_text(file)
