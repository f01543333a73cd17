"""The page of vLLM's options is the table by which a server checks them."""

import dataclasses
import re

import options_page
from vllm.engine.arg_utils import EngineArgs

from vllm_metal.options.check import flag


def test_the_page_is_current():
    assert options_page.main(["--check"]) == 0


def test_a_page_that_is_not_current_is_found(tmp_path, monkeypatch, capsys):
    page = tmp_path / "options.md"
    page.write_text("# vLLM's options\n")
    monkeypatch.setattr(options_page, "PAGE", page)
    assert options_page.main(["--check"]) == 1
    assert "run scripts/options_page.py" in capsys.readouterr().err
    assert options_page.main([]) == 0
    assert page.read_text() == options_page.page()


def test_every_option_is_on_the_page_once():
    named = re.findall(r"(?<=[|,] )\*?`(\S+?)`\*?(?=[,| ])", options_page.page())
    fields = {flag(field.name) for field in dataclasses.fields(EngineArgs)}
    assert sorted(name for name in named if name in fields) == sorted(fields)
