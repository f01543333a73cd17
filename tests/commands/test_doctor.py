"""`vllm-metal doctor` on the CPU: its exit code, its report, and what it refuses."""

import argparse
import json
import re

import pytest

from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.commands import doctor, kernel_checks
from vllm_metal.commands.decode_timing import StepTime
from vllm_metal.commands.kernel_trial import KernelTrial
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.configure(parser)
    return parser.parse_args(arguments)


def examine(*arguments: str) -> int:
    args = parse(*arguments, "--head-size", "64")
    return args.run(args)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("LENGTHS", "LENGTHS_ON_HOST"):
        monkeypatch.setattr(kernel_checks, name, (17,))


@needs_lazy_target
@pytest.mark.parametrize("pair", ["q8_0/q3_0", "uint4/q4_0"])
def test_right_kernels_that_run_as_late_as_a_gpus_are_ok(capsys, monkeypatch, pair):
    monkeypatch.setattr(doctor, "HostTarget", LazyTarget)
    assert examine("--formats", pair) == 0
    assert capsys.readouterr().out.endswith("OK: all results are right.\n")


def test_the_report_and_its_json_hold_the_same(capsys):
    assert examine("--formats", "q8_0/q3_0") == 0
    text = capsys.readouterr().out
    assert examine("--formats", "q8_0/q3_0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["kernels"] == "host" and found["steps"] == []
    assert [check["pages"] for check in found["checks"]] == ["dense, MLX", "dense", "q8_0/q3_0"]
    for name in ("device", "system", "python", "vllm_metal", "vllm", "mlx", "mlx-lm"):
        assert found[name] in text
    assert "was not measured" in text


def test_wrong_kernels_fail(capsys, monkeypatch):
    monkeypatch.setattr(KernelTrial, "wrong_bytes", lambda *_: 7)
    assert examine("--formats", "q8_0/q3_0") == 1
    out = capsys.readouterr().out
    assert re.search(r"q8_0/q3_0: \d+ stored bytes differ from those of the codec", out)
    assert out.endswith("FAILED: q8_0/q3_0\n")


def test_all_pairs_of_the_documentation_are_the_default():
    assert parse().formats == list(map(str, SHOWN_PAIRS))


class Gpu(LazyTarget):
    """Stands for a GPU's target."""

    name = "metal"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(doctor, "available_target", Gpu)
    monkeypatch.setattr(doctor, "KV_HEADS", 2)
    monkeypatch.setattr(doctor, "copy_gigabytes_per_second", lambda: 100.0)


@needs_lazy_target
def test_on_a_gpu_steps_of_dense_pages_and_of_every_pair_are_timed(capsys, monkeypatch, gpu):
    names = []

    def steps(backends, memory_limit):
        assert memory_limit > 0
        names.extend(backend.name for _, backend in backends)
        for name, backend in backends:
            yield StepTime(name, 1, 1024, 2.0, 28 * 1024 * 2 * backend.slot_size)

    monkeypatch.setattr(doctor, "time_steps", steps)
    assert examine("--formats", "q8_0/q3_0", "--json") == 0
    assert names == ["dense float16 (metal kernels)", "turboquant q8_0/q3_0 (metal kernels)"]
    found = json.loads(capsys.readouterr().out)
    assert [step["pages"] for step in found["steps"]] == ["dense", "q8_0/q3_0"]
    assert found["copy_gigabytes_per_second"] == 100.0


@needs_lazy_target
def test_a_timing_that_fails_leaves_what_was_found(capsys, monkeypatch, gpu):
    def stops(*_):
        yield StepTime("dense", 1, 1024, 2.0, 10**6)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(doctor, "time_steps", stops)
    assert examine("--formats", "q8_0/q3_0") == 1
    out = capsys.readouterr().out
    assert "The timing stopped: RuntimeError: out of memory" in out and "1 x 1,024" in out
    assert out.endswith("FAILED: timing\n")


def test_unknown_formats_are_refused():
    with pytest.raises(UserError, match="q9_0"):
        examine("--formats", "q9_0/q3_0")
    with pytest.raises(UserError, match="--formats q8_0 .*'q8_0' is not KEYS/VALUES"):
        examine("--formats", "q8_0")
