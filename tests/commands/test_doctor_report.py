"""The doctor's report: its rows line up and its verdict follows from what was found."""

import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.commands.decode_timing import SHAPES, StepTime
from vllm_metal.commands.doctor_report import CHECK_HEADER, PACKAGES, STEP_HEADER, Report
from vllm_metal.commands.kernel_checks import Check

FACTS = {
    "device": "Apple M4 Max",
    "device_kind": "metal",
    "architecture": "applegpu_g16s",
    "gpu_cores": 40,
    "memory_limit": 36 << 30,
    "system": "macOS-15.5-arm64",
    "macos": "15.5",
    "python": "3.12.7",
    "vllm_metal": "0.1.0",
    "kernels": "metal",
    **dict.fromkeys(PACKAGES, "1.2.3"),
}
CHECKS = [
    Check("dense, MLX", error=1e-3, allowed=5e-3),
    Check("dense", 1.25, 0, 8e-4, 5e-3),
    Check("q8_0/q3_0", 2.25, 0, 7e-4, 5e-3),
]
STEPS = [
    StepTime("dense", *SHAPES[0], 4.0, 400_000_000),
    StepTime("q8_0/q3_0", *SHAPES[0], 2.0, 100_000_000),
]


def report(**changes) -> Report:
    arguments = {"checks": CHECKS, "steps": STEPS, "copy_rate": 200.0} | changes
    return Report(FACTS, LayerShape(8, 128, 128), 16, **arguments)


def lines(**changes) -> list[str]:
    return report(**changes).render().splitlines()


def test_a_report_from_a_mac_names_what_a_reader_elsewhere_must_know():
    text = report().render()
    for fact in ("Apple M4 Max (applegpu_g16s)", "40", "36.00 GiB", "15.5", "3.12.7", "1.2.3"):
        assert fact in text
    assert "32 query heads and 8 KV heads of 128 elements, blocks of 16 tokens" in text


def test_checks_are_a_table():
    found = lines()
    _, operations, dense, pair = found[found.index(CHECK_HEADER) :][:4]
    assert operations.split() == ["dense,", "MLX", "-", "-", "1.0e-03", "5.0e-03", "OK"]
    assert dense.split() == ["dense", "1.2", "s", "0", "8.0e-04", "5.0e-03", "OK"]
    assert pair.split() == ["q8_0/q3_0", "2.2", "s", "0", "7.0e-04", "5.0e-03", "OK"]
    assert len(CHECK_HEADER) == len(pair) - len("  OK")


def test_steps_are_a_table():
    found = lines()
    _, dense, pair = found[found.index(STEP_HEADER) :][:3]
    assert dense.split()[:4] == ["1", "x", "1,024", "dense"]
    assert pair.split()[4:] == ["2.00", "0.50x", "0.10", "50", "25", "%"]
    assert len(STEP_HEADER) == len(dense) == len(pair)
    assert "A copy on this device reads and writes 200 GB/s together." in found


def test_shapes_without_a_time_are_named():
    left_out = [f"{requests} x {tokens:,}" for requests, tokens in SHAPES[1:]]
    assert lines()[-3].endswith(f"of the memory: {', '.join(left_out)}.")
    every = [StepTime("dense", *shape, 4.0, 10**8) for shape in SHAPES]
    assert "Left out" not in report(steps=every).render()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "OK: all results are right."),
        ({"timing_failure": "out of memory"}, "FAILED: timing"),
        ({"checks": [Check("q8_0/q3_0", failure="it is wrong")]}, "FAILED: q8_0/q3_0"),
    ],
    ids=str,
)
def test_the_verdict_follows_from_what_was_found(changes, verdict):
    found = report(**changes)
    assert found.render().splitlines()[-1] == verdict
    assert found.ok is found.as_dict()["ok"] is verdict.startswith("OK")


def test_failures_are_told_in_full():
    text = report(checks=[Check("q8_0/q3_0", failure="it is wrong")], steps=[]).render()
    assert "q8_0/q3_0: it is wrong" in text and "FAILED" in text


def test_without_a_gpu_the_report_says_why_nothing_is_timed():
    found = Report(FACTS | {"kernels": "host", "gpu_cores": 0}, LayerShape(2, 64, 64), 16, CHECKS)
    assert "MLX has no GPU here" in found.render() and "GPU cores" not in found.render()
