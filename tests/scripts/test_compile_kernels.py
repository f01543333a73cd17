"""The script that calls Metal's compiler, with a stand-in for `xcrun` on the path."""

import json
import os
import stat
from pathlib import Path

import compile_kernels
import mlx.core as mx
import pytest

from tests.kernels.metal_text import compile_errors, for_clang
from vllm_metal.metal_kernel_backend.kernel_library import KERNELS
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair

XCRUN = """#!/bin/sh
# xcrun -sdk macosx TOOL ...: notes its arguments, and fails where a source says so.
echo "$@" >> "$XCRUN_LOG"
case "$3" in
    metal)
        for word; do
            case "$word" in *.metal | *.h)
                if grep -q PLANTED "$word"; then echo "$word:1: error: planted" >&2; exit 1; fi ;;
            esac
        done ;;
esac
for word; do last=$word; done
case "$last" in *.air | *.metallib) : > "$last" ;; *) echo "a version" ;; esac
"""


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Puts a stand-in for `xcrun` on the path; gives what it was called with so far."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "xcrun"
    program.write_text(XCRUN)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XCRUN_LOG", str(log))
    monkeypatch.setattr(compile_kernels, "SHOWN_PAIRS", [parse_pair("q8_0/q3_0")])
    monkeypatch.setattr(compile_kernels, "HEAD_SIZES", (64, 128))
    monkeypatch.setattr(compile_kernels, "GROUPS", (4,))
    return lambda: log.read_text().splitlines()


def test_every_file_and_every_kernel_is_compiled_and_linked(calls, tmp_path, capsys):
    out = tmp_path / "out"
    assert compile_kernels.main([str(out)]) == 0
    report = json.loads((out / "results.json").read_text())
    names = [result["name"] for result in report["results"]]
    files = [f"file {path.relative_to(KERNELS)}" for path in compile_kernels.kernel_files()]
    kinds = ("dense float16", "dense bfloat16", "q8_0/q3_0")
    assert names == [*files, *(f"{kind} {i}" for kind in kinds for i in range(4)), "library"]
    assert report["standard"] == "metal3.2" and report["compiler"] == "a version"
    compiled = [call for call in calls() if " metal -std=metal3.2 -x metal " in call]
    assert len(compiled) == len(names) - 1
    [library] = [call for call in calls() if " metallib " in call]
    for kind in ("dense-float16", "dense-bfloat16", "q8_0-q3_0"):
        assert all(f"{kind}_{i}.metal.air" in library for i in range(4))
    assert f"{len(names)} of {len(names)} compiled as metal3.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "prefix", "read"),
    [(parse_pair("q8_0/q3_0"), "turboquant", "dequantize"), (mx.bfloat16, "dense", "gather")],
)
def test_the_texts_are_those_of_all_kernels_in_every_size(monkeypatch, kind, prefix, read):
    monkeypatch.setattr(compile_kernels, "HEAD_SIZES", (64, 128))
    texts = compile_kernels.texts(kind)
    forms_of_decode = 2 if prefix == "turboquant" else 1
    errors = [compile_errors(for_clang(text)) for text in texts]
    assert errors == [""] * (3 + forms_of_decode)
    together = "".join(texts)
    for kernel in ("store", "decode", "merge", read):
        assert f"{prefix}_{kernel}_" in together
    assert "bfloat16_t" in together and ("float16_t" in together or prefix == "dense")


def test_a_file_that_does_not_compile_is_told_and_fails(calls, monkeypatch, tmp_path, capsys):
    wrong = tmp_path / "wrong.h"
    wrong.write_text("PLANTED")
    monkeypatch.setattr(compile_kernels, "kernel_files", lambda: [wrong])
    monkeypatch.setattr(compile_kernels, "KERNELS", tmp_path)
    out = tmp_path / "out"
    assert compile_kernels.main([str(out), "--standard", "metal4.0"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  file wrong.h" in printed and "error: planted" in printed
    results = json.loads((out / "results.json").read_text())["results"]
    assert [result["name"] for result in results if not result["ok"]] == ["file wrong.h"]
    assert not any(" metallib " in call for call in calls())


def test_mlx_carries_the_header_that_it_puts_in_front():
    header = compile_kernels.UTILS.split('"')[1]
    assert (Path(mx.__file__).parent / "include" / header).is_file()
