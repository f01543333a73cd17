"""The arguments of `vllm-metal bench`, and the process of an engine."""

import re
from dataclasses import replace

import pytest

from tests.tiny_models import save_checkpoint, save_tokenizer
from vllm_metal import cli
from vllm_metal.benchmark.command import measured
from vllm_metal.benchmark.engines import MLX_LM, Settings
from vllm_metal.benchmark.one_engine import Task
from vllm_metal.benchmark.timing import Case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], r"--requests 0 is not allowed \(allowed: 1 or more\)"),
        (["--contexts", "8", "-1"], "--contexts -1 is not allowed"),
        (["--chunk", "0"], r"--chunk 0 is not allowed \(allowed: more than 0\)"),
        (["--minutes", "-2"], "--minutes -2 is not allowed"),
        (["--formats", "q9_0/q3_0"], "--formats q9_0/q3_0: .*q8_0"),
        (["--output", "/no/such/folder/x.json"], "--output .* is in no folder that exists"),
        (["--plot", "/no/such/folder/x.png"], "--plot .* is in no folder that exists"),
    ],
)
def test_what_is_not_allowed(arguments, message, capsys):
    assert cli.main(["bench", "no-such-model", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def task(tmp_path) -> Task:
    folder = save_checkpoint(tmp_path / "llama")
    save_tokenizer(folder)
    settings = Settings(str(folder), None, False, 40, 1, 32, None)
    return Task(MLX_LM, settings, [Case(1, 20), Case(1, 40)], 600)


def test_an_engine_in_its_process(task, capsys):
    engine, *rows = measured(task)
    assert engine == {"cache_tokens": None}
    assert [row["context"] for row in rows] == [20, 40]
    assert all(row["step_milliseconds"] > 0 for row in rows)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == [MLX_LM] * 4


def test_an_engine_that_fails(task, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = replace(task, settings=replace(task.settings, model=str(tmp_path / "empty")))
    [row] = measured(broken)
    assert row.keys() == {"failed"} and "empty" in row["failed"]
    assert row["failed"] in capsys.readouterr().err
