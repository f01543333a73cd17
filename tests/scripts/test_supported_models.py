"""The page of supported models is what the script finds, for a sample of each kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import supported_models as script

SCRIPTS = Path(__file__).parents[2] / "scripts"

SAMPLE = ("llama", "mixtral", "gpt_bigcode", "deepseek_v3", "gemma3n", "gpt_oss", "qwen3_next")
"""Plain, MoE, one request at a time, MLA, window with shared KV, window with sinks, hybrid."""

SERVED = {"status": "served", "difference": 1e-6, "batched_decode": True}
REFUSED = {"status": "refused", "reasons": ["layer 0 is odd", "layer 2 is odd", "so is the model"]}
WRONG = {"status": "wrong", "reasons": ["a | b\nc"]}


def result(dense, turboquant, kinds=(), notes=()):
    return {"kinds": list(kinds), "notes": list(notes), "dense": dense, "turboquant": turboquant}


def make_page(**architectures) -> str:
    return script.page(
        {"versions": {"mlx-lm": "9.9"}, "aliases": {"new": "old"}, "architectures": architectures}
    )


def test_the_page_is_made_from_the_results(capsys):
    """Also that every model file of mlx-lm has its row."""
    assert script.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.nightly
def test_a_sample_gives_the_same_results():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "supported_models.py", "--check", *SAMPLE],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.strip() == ""
    assert done.returncode == 0


def test_nothing_that_is_wrong_is_committed():
    committed = json.loads(script.RESULTS.read_text())["architectures"]
    wrong = [name for name, result in committed.items() if "wrong" in script.statuses(result)]
    assert wrong == []


def test_another_outcome_is_a_difference_and_another_figure_is_none():
    committed = {"a": result(SERVED, SERVED), "b": result(SERVED, SERVED)}
    found = {
        "a": result(SERVED | {"difference": 2e-6}, SERVED),
        "b": result(SERVED | {"batched_decode": False}, REFUSED),
        "c": result(SERVED, SERVED),
    }
    assert [line.partition(":")[0] for line in script.differences(found, committed)] == ["b", "c"]


@pytest.mark.nightly
def test_a_process_that_dies_is_one_architectures_result():
    died = script.run(["no such architecture"], jobs=1)["no such architecture"]
    assert died["dense"] == died["turboquant"]
    assert died["dense"]["status"] == "wrong"
    assert died["dense"]["reasons"] == ["the process ended with exit code 1"]


def test_the_page_counts_and_says_why():
    page = make_page(
        a=result(SERVED, REFUSED, ["MoE"]),
        b=result(SERVED | {"batched_decode": False, "difference": 3e-6}, SERVED, [], ["odd"]),
    )
    assert "| | served | refused |\n| --- | --- | --- |\n| dense | 2 | 0 |\n" in page
    assert "| TurboQuant | 1 | 1 |\n" in page
    assert "| `a` | MoE | served | refused |\n" in page
    assert "| `b` |  | served, one at a time | served |\n" in page
    assert "- *TurboQuant*: a layer is odd. Model files: `a`.\n" in page
    assert "- *TurboQuant*: so is the model. Model files: `a`.\n" in page
    assert "- `b`: odd.\n" in page
    assert "largest difference found is 3e-06." in page
    assert "`new` with `old`." in page


def test_what_is_wrong_stands_out():
    page = make_page(a=result(WRONG, WRONG))
    assert "| | wrong |\n| --- | --- |\n| dense | 1 |\n" in page
    assert "| `a` |  | **wrong** | **wrong** |\n" in page
    assert "- *Dense pages and TurboQuant*: a | b c. Model files: `a`.\n" in page


def test_a_reason_that_models_share_is_given_once():
    page = make_page(
        a=result(REFUSED, REFUSED), b=result(SERVED, REFUSED), c=result(SERVED, REFUSED)
    )
    assert page.count("a layer is odd") == 2
    assert "- *Dense pages and TurboQuant*: a layer is odd. Model files: `a`.\n" in page
    assert "- *TurboQuant*: a layer is odd. Model files: `b`, `c`.\n" in page
