"""`vllm-metal plan`: which machine it is asked about, and how it answers in little time."""

import argparse
import json
import re
import subprocess
import sys

import pytest

from tests.tiny_models import config_of
from vllm_metal.commands import plan
from vllm_metal.commands.plan_table import SHOWN_PAIRS
from vllm_metal.errors import UserError
from vllm_metal.machine.device import Device

GIB = 1 << 30


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


def kv_cache_bytes(folder, capsys, *arguments) -> int:
    assert run(folder, *arguments, "--weights", "1GiB", "--json") == 0
    return json.loads(capsys.readouterr().out)["kv_cache_bytes"]


def test_memory_is_the_ram_of_a_mac(folder, capsys):
    """Its GPU may use part of it only."""
    for ram, working_set in ((16, 16 * GIB * 2 // 3), (64, 48 * GIB)):
        found = kv_cache_bytes(folder, capsys, "--memory", f"{ram}GiB")
        assert found == int(working_set * 0.92) - GIB - plan.WORKSPACE


def test_the_working_set_may_be_named(folder, capsys):
    found = kv_cache_bytes(folder, capsys, "--memory", "16GiB", "--working-set", "12GiB")
    assert found == int(12 * GIB * 0.92) - GIB - plan.WORKSPACE


def test_the_machine_at_hand_is_planned_for_by_default(folder, capsys, monkeypatch):
    """As a server on it does: others hold a part."""
    device = Device("cpu", "a small machine", 8 * GIB, 4 * GIB)
    monkeypatch.setattr(plan, "select_device", lambda: device)
    assert kv_cache_bytes(folder, capsys) == 4 * GIB - GIB - plan.WORKSPACE
    run(folder)
    text = capsys.readouterr().out
    assert "memory of a small machine" in text and "held by other processes 4.00 GiB" in text


def test_the_text(folder, capsys):
    """The plan's terms, a line for every pair, and what the losses were measured on."""
    run(folder, "--memory", "2GiB", "--max-model-len", "1000")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: 3 attention layers"
    assert lines[1] == "    memory of a Mac with 2.00 GiB of RAM"
    assert "    workspace 512.00 MiB (assumed)" in lines
    table = lines[lines.index("") + 1 :]
    assert "x 1,000" in table[0]
    assert table[2 + len(SHOWN_PAIRS)] == ""
    assert table[1 + len(SHOWN_PAIRS)].endswith("  SmolLM2-135M-Instruct")
    assert "Other models lose more or less" in table[-1]


def test_weights_that_leave_no_room_are_an_error_with_the_sum(folder):
    with pytest.raises(UserError, match="workspace 512.00 MiB"):
        run(folder, "--memory", "256MiB")


def in_a_process_of_its_own(*arguments) -> subprocess.CompletedProcess:
    """The command as a shell starts it; ends with the names of the large modules it loaded."""
    program = (
        "import sys\n"
        "from vllm_metal.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_layers_of_one_kind_need_neither_torch_nor_vllm(folder):
    done = in_a_process_of_its_own(folder, "--memory", "16GiB")
    assert done.returncode == 0, done.stderr
    assert re.search("q8_0 +q3_0 ", done.stdout)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.nightly
def test_layers_of_several_kinds_are_grouped_by_vllm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma3_text")))
    done = in_a_process_of_its_own(tmp_path, "--memory", "16GiB")
    assert done.returncode == 0, done.stderr
    assert "asking vLLM how it groups them" in done.stderr
    assert "of them in a sliding window" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_refusal_in_that_process_is_shown_as_elsewhere(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma3_text")))
    plan.configure(parser := argparse.ArgumentParser())
    args = parser.parse_args([str(tmp_path), "--memory", "16MiB"])
    with pytest.raises(SystemExit) as end:
        plan._end_with_plan(args)
    assert end.value.code == 2


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
