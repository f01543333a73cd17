"""A dispatched evaluation runs while its caller goes on, and one at a time."""

from threading import Event

import mlx.core as mx
import pytest

from vllm_metal.runner.dispatch import make_dispatch

SECONDS = 10
"""After which a test fails that waits for another thread."""

evaluate = mx.eval


@pytest.fixture
def dispatch():
    """On the CPU; a GPU evaluates in the background by itself."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    stream = mx.default_stream(mx.cpu)
    yield make_dispatch()
    mx.set_default_stream(stream)
    mx.set_default_device(device)


def test_the_caller_goes_on_and_builds_on_a_result_in_flight(dispatch, monkeypatch):
    caller_went_on, seen = Event(), []

    def evaluate_later(*arrays):
        seen.append(caller_went_on.wait(SECONDS))
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate_later)
    total = mx.ones((4,)) + 1
    wait = dispatch(total)
    following = total * 10
    caller_went_on.set()
    wait()
    assert seen == [True]
    assert following.tolist() == [20] * 4


def test_an_evaluation_begins_when_the_one_before_has_ended(dispatch, monkeypatch):
    both_dispatched, order = Event(), []

    def evaluate_slowly(name, array):
        order.append(f"{name} begins")
        both_dispatched.wait(SECONDS)
        evaluate(array)
        order.append(f"{name} ends")

    monkeypatch.setattr(mx, "eval", evaluate_slowly)
    waits = [dispatch(name, mx.ones((4,)) + 1) for name in ("first", "second")]
    both_dispatched.set()
    for wait in waits:
        wait()
    assert order == ["first begins", "first ends", "second begins", "second ends"]


@pytest.mark.parametrize("kernels_write_pages", [True, False])
def test_a_gpu_gets_a_step_while_one_runs_only_where_kernels_write_pages(
    monkeypatch, kernels_write_pages
):
    calls = []
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "synchronize", lambda: calls.append("waits"))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: calls.append(arrays))
    make_dispatch(kernels_write_pages)("tokens", ["pages"])()
    expected = [("tokens", ["pages"])]
    assert calls == (expected if kernels_write_pages else ["waits", *expected])


def test_waiting_raises_what_the_evaluation_raised(dispatch, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mx, "eval", fail)
    wait = dispatch(mx.ones((4,)))
    with pytest.raises(RuntimeError, match="out of memory"):
        wait()


def test_lists_of_arrays_are_evaluated(dispatch):
    total, pages = mx.ones((4,)) + 1, [mx.zeros((2,)) + 3]
    dispatch(total, pages)()
    assert total.tolist() == [2] * 4 and pages[0].tolist() == [3, 3]
