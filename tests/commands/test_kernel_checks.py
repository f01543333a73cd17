"""Right kernels are found right, as late as a GPU runs them, and wrong ones wrong."""

import mlx.core as mx
import pytest

from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.attention.backend import LayerShape
from vllm_metal.commands import kernel_checks
from vllm_metal.commands.kernel_checks import Check, check_dense, check_kernels, check_pair
from vllm_metal.commands.kernel_trial import DenseTrial, KernelTrial
from vllm_metal.metal_kernel_backend import host_target
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

LAYOUT = PageLayout.of("q8_0", "q3_0", 64, 2, 16)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("LENGTHS", "LENGTHS_ON_HOST"):
        monkeypatch.setattr(kernel_checks, name, (17,))


def check(target: Target | None = None, layout: PageLayout = LAYOUT) -> Check:
    return check_pair("a pair", layout, target or HostTarget())


@pytest.mark.parametrize("target", [HostTarget, pytest.param(LazyTarget, marks=needs_lazy_target)])
def test_right_kernels_are_found_right(target):
    found = check(target())
    assert found.failure == "" and found.wrong_bytes == 0
    assert 0 < found.error < found.allowed


def test_the_form_for_more_query_heads_than_a_trial_has_is_checked_too(monkeypatch):
    right = Launcher.decode

    def off(self, *arguments, **settings):
        wrong = 1.1 if self.matrix.least_rows == 1 else 1.0
        return wrong * right(self, *arguments, **settings)

    monkeypatch.setattr(Launcher, "decode", off)
    assert "a relative error of 1.0e-01" in check().failure


@pytest.mark.parametrize(
    "target", [None, HostTarget, pytest.param(LazyTarget, marks=needs_lazy_target)]
)
def test_dense_pages_are_found_right(target):
    found = check_dense(LayerShape(2, 64, 64), 16, target and target())
    assert found.failure == "" and 0 < found.error < found.allowed
    assert found.wrong_bytes == 0 and found.pages == ("dense" if target else "dense, MLX")


@pytest.mark.parametrize("method", ["decode", "read"])
def test_dense_pages_with_wrong_results_are_found(monkeypatch, method):
    right = getattr(DenseTrial, method)

    def off(*each):
        results = right(*each)
        return 1.1 * results if method == "decode" else [1.1 * part for part in results]

    monkeypatch.setattr(DenseTrial, method, off)
    found = check_dense(LayerShape(2, 64, 64), 16)
    assert "a relative error of 1.0e-01" in found.failure


def test_dense_bytes_that_differ_from_those_of_the_operations_are_found(monkeypatch):
    store = DenseFused.store

    def off(self, pages, keys, values, metadata):
        return store(self, pages, keys, values + 2**-9 * (values == values[0, 0, 0]), metadata)

    monkeypatch.setattr(DenseFused, "store", off)
    found = check_dense(LayerShape(2, 64, 64), 16, HostTarget())
    assert found.wrong_bytes and "differ from those of MLX operations" in found.failure


def test_on_the_cpu_the_programs_of_dense_pages_are_compiled_ahead(monkeypatch):
    ahead, needed = set(), []
    compiled = host_target.compiled
    monkeypatch.setattr(kernel_checks, "compile_ahead", ahead.update)
    monkeypatch.setattr(
        host_target, "compiled", lambda program: needed.append(program) or compiled(program)
    )
    check_dense(LayerShape(2, 64, 64), 16, HostTarget())
    assert needed and set(needed) == ahead


def test_bytes_that_differ_from_the_codecs_are_found(monkeypatch):
    """The kernel is given values that are a little larger than those that the codec gets."""
    store = KernelTrial.store

    def off(self):
        self.values, kept = self.values * 1.01, self.values
        token, self.values = store(self), kept
        return token

    monkeypatch.setattr(KernelTrial, "store", off)
    found = check()
    assert found.wrong_bytes and found.failure.endswith("differ from those of the codec")


@pytest.mark.parametrize("kind", [DenseTrial, KernelTrial])
def test_a_broken_key_without_effect_is_found(monkeypatch, kind):
    monkeypatch.setattr(kind, "break_last_key", lambda self: None)
    found = check() if kind is KernelTrial else check_dense(LayerShape(2, 64, 64), 16)
    assert found.failure == "a key that is not finite gives an output that is"


def test_a_broken_key_that_reaches_the_other_request_is_found(monkeypatch):
    def everywhere(self):
        self.keys = self.keys * mx.nan

    monkeypatch.setattr(DenseTrial, "break_last_key", everywhere)
    found = check_dense(LayerShape(2, 64, 64), 16)
    assert "a relative error of inf" in found.failure


@pytest.mark.parametrize("setting", ["sinks", "window"])
def test_sinks_and_windows_are_checked(monkeypatch, setting):
    decode = KernelTrial.decode

    def without(self, token, **settings):
        return decode(self, token, **{n: v for n, v in settings.items() if n != setting})

    monkeypatch.setattr(KernelTrial, "decode", without)
    assert "a relative error of" in check(layout=PageLayout.of("uint4", "q3_0", 64, 2, 16)).failure


def test_a_window_is_checked_for_every_pair(monkeypatch):
    decode = KernelTrial.decode
    monkeypatch.setattr(KernelTrial, "decode", lambda self, token, **_: decode(self, token))
    found = check_pair("a pair", LAYOUT, HostTarget(), thorough=False)
    assert "a relative error of" in found.failure


def test_what_prefill_dequantises_is_checked(monkeypatch):
    dequantize = KernelTrial.dequantize

    def off(self, token):
        keys, values = dequantize(self, token)
        return keys, values * 1.1

    monkeypatch.setattr(KernelTrial, "dequantize", off)
    found = check()
    assert "a relative error of 1.0e-01" in found.failure
    assert found.error == pytest.approx(0.1, rel=1e-2)


def test_results_that_are_not_numbers_are_found(monkeypatch):
    decode = KernelTrial.decode
    monkeypatch.setattr(KernelTrial, "decode", lambda *a, **k: decode(*a, **k) * mx.nan)
    found = check()
    assert found.error == float("inf") and "relative error of inf" in found.failure


@needs_lazy_target
def test_readers_that_do_not_wait_for_the_store_are_found(monkeypatch):
    """Their graph lacks the token, which on a GPU is all that orders them."""
    decode, early = TurboQuantFused.decode, mx.zeros(8, mx.uint32)

    def unordered(self, pages, rows):
        return decode(self, pages._replace(token=early), rows)

    monkeypatch.setattr(TurboQuantFused, "decode", unordered)
    found = check(LazyTarget())
    assert "a relative error of" in found.failure and not found.wrong_bytes


def test_a_kernel_that_cannot_be_compiled_is_a_finding(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel_checks, "check_trial", broken)
    assert check().failure == "RuntimeError: no compiler"


def test_on_the_cpu_all_programs_are_compiled_ahead(monkeypatch):
    """Those of a pair before it is checked, and those of the next one meanwhile."""
    ahead, needed, checked = set(), [], []
    compile_ahead, compiled = kernel_checks.compile_ahead, host_target.compiled
    check_pair = kernel_checks.check_pair

    def noted(programs):
        ahead.update(programs)
        compile_ahead(programs)

    def needs(program):
        needed.append(program in ahead)
        return compiled(program)

    def counted(pair, *arguments, **settings):
        checked.append((pair, len(ahead)))
        return check_pair(pair, *arguments, **settings)

    monkeypatch.setattr(kernel_checks, "compile_ahead", noted)
    monkeypatch.setattr(host_target, "compiled", needs)
    monkeypatch.setattr(kernel_checks, "check_pair", counted)
    other = PageLayout.of("q8_0", "q8_0", 64, 2, 16)
    checks = check_kernels({"first": LAYOUT, "second": other}, HostTarget())
    assert [(found.pages, found.failure) for found in checks] == [("first", ""), ("second", "")]
    assert needed and all(needed)
    assert checked[0] == ("first", len(ahead))
