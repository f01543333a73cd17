"""`vllm-metal doctor` on the CPU: it finds right kernels right and wrong ones wrong."""

import argparse
import json

import numpy as np
import pytest

from vllm_metal.commands import doctor
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantizer


def examine(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.configure(parser)
    args = parser.parse_args([*arguments, "--head-size", "64"])
    return args.run(args)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(doctor, "CHECK_LENGTHS", (17,))


def test_right_kernels_are_found_right(capsys):
    assert examine("--formats", "q8_0/q3_0") == 0
    out = capsys.readouterr().out
    assert "equal the codec" in out and "The kernels are right here." in out
    assert "their speed means nothing" in out


def test_json_holds_the_same(capsys):
    assert examine("--formats", "q8_0/q3_0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["kernels"] == "host"
    assert found["formats"][0]["wrong_bytes"] == 0


def test_a_difference_fails(capsys, monkeypatch):
    """The codec's scales are changed, so that kernel and codec disagree."""
    quantize = Quantizer.quantize

    def different(self, y):
        return quantize(self, y * np.float32(1.01))

    monkeypatch.setattr(Quantizer, "quantize", different)
    assert examine("--formats", "q8_0/q3_0") == 1
    assert "FAILED: q8_0/q3_0" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["sinks", "window"])
def test_sinks_and_windows_are_checked_too(capsys, monkeypatch, what):
    decode = doctor.Trial.decode
    monkeypatch.setattr(
        doctor.Trial,
        "decode",
        lambda self, token, **settings: decode(
            self, token, **{name: value for name, value in settings.items() if name != what}
        ),
    )
    assert examine("--formats", "uint4/q3_0") == 1
    assert "numbers are off by" in capsys.readouterr().out


def test_what_prefill_dequantises_is_checked_too(capsys, monkeypatch):
    dequantize = doctor.Trial.dequantize

    def off(self, token):
        keys, values = dequantize(self, token)
        return keys, values * 1.1

    monkeypatch.setattr(doctor.Trial, "dequantize", off)
    assert examine("--formats", "q8_0/q3_0") == 1
    assert "numbers are off by 1.0e-01" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_compiled_fails(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor, "check", broken)
    assert examine("--formats", "q8_0/q3_0") == 1
    assert "no compiler" in capsys.readouterr().out


def test_speeds_are_a_table():
    speed = doctor.Speed(8192, 120.0, 180.0, 30.0, 512.4, 90.0)
    report = doctor.Report("q8_0/q3_0", store_us=5.0, speeds=[speed])
    facts = {"kernels": "metal", "memory_limit": 1 << 34}
    lines = doctor.render(facts, [report], 128, 8).splitlines()
    header, row = lines[lines.index(doctor.SPEED_HEADER) :][:2]
    assert row.split() == ["8192", "120", "180", "1.50", "x", "512", "25", "%", "90"]
    assert len(header) == len(row)


def test_unknown_formats_are_refused():
    with pytest.raises(UserError, match="q9_0"):
        examine("--formats", "q9_0/q3_0")
    with pytest.raises(UserError, match="--formats q8_0 .*'q8_0' is not KEYS/VALUES"):
        examine("--formats", "q8_0")
