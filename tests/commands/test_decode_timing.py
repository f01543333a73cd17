"""The step that is timed computes what a server computes. Nothing here is timed."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.metadata import DecodeMetadata
from vllm_metal.commands import decode_timing
from vllm_metal.commands.decode_timing import DecodeStep, copy_gigabytes_per_second, time_steps
from vllm_metal.commands.kernel_checks import fused_backend
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

SHAPE = LayerShape(2, 64, 64)
DENSE = DensePages(SHAPE, 16, mx.float32)
REQUESTS, CONTEXT, LAYERS, HEADS = 2, 21, 3, 8


def step_of(backend: AttentionBackend) -> DecodeStep:
    return DecodeStep(backend, REQUESTS, CONTEXT, LAYERS, HEADS, mx.float32)


def oracle(step: DecodeStep) -> np.ndarray:
    """Each layer attends from the output of the one before over its pages, [B, Hq, D]."""
    metadata: DecodeMetadata = step._metadata
    keys, values = (np.array(part) for part in DENSE.read(step.pages[0], metadata))
    x = np.array(step._queries)
    for _ in range(LAYERS):
        keys[:, :, CONTEXT - 1] = values[:, :, CONTEXT - 1] = x[:, :2]
        x = np.stack(
            [
                reference.attention(
                    x[i][:, None], keys[i, :, :CONTEXT], values[i, :, :CONTEXT], 64**-0.5
                )[:, 0]
                for i in range(REQUESTS)
            ]
        )
    return x


def test_layers_follow_one_another_over_pages_of_their_own():
    step = step_of(DENSE)
    expected = oracle(step)
    np.testing.assert_allclose(np.array(step.build()), expected, atol=1e-5)
    assert len({id(pages.array) for pages in step.pages}) == LAYERS
    np.testing.assert_allclose(np.array(step.build()), expected, atol=1e-5)


@needs_lazy_target
def test_the_kernels_run_the_same_step_in_one_evaluation():
    """With 8 bits, as near as they come; the order of stores and reads is in the graph alone."""
    backend = fused_backend(PageLayout.of("q8_0", "q8_0", 64, 2, 16), LazyTarget())
    step = step_of(backend)
    output = np.array(step.evaluated())
    expected = oracle(step_of(DENSE))
    assert np.linalg.norm(output - expected) < 2e-2 * np.linalg.norm(expected)


def test_each_layer_may_be_evaluated_by_itself():
    seen = []
    step = step_of(DENSE)
    step.build(evaluate=lambda *arrays: seen.append(len(arrays)))
    assert seen == 2 * LAYERS * [1]


def test_bytes_are_those_that_the_tokens_occupy():
    assert step_of(DENSE).bytes_read == LAYERS * REQUESTS * CONTEXT * 2 * (64 + 64) * 4


@pytest.fixture
def no_clock(monkeypatch) -> Callable[[], int]:
    """Every measurement takes 2 ms, the first ones 100; gives how many there were."""
    times = []

    def counter() -> float:
        times.append(1)
        first = len(times) <= 2 * decode_timing.WARM_UP
        return len(times) * (0.1 if first else 0.002)

    monkeypatch.setattr(decode_timing.time, "perf_counter", counter)
    return lambda: len(times) // 2


def test_the_median_is_of_warm_runs(no_clock):
    assert step_of(DENSE).milliseconds() == pytest.approx(2)
    assert no_clock() == decode_timing.WARM_UP + decode_timing.REPEATS


def test_a_copy_counts_bytes_read_and_written(no_clock, monkeypatch):
    monkeypatch.setattr(decode_timing, "_COPIED_BYTES", 1 << 20)
    assert copy_gigabytes_per_second() == pytest.approx(2 * (1 << 20) / 0.002 / 1e9)


def test_shapes_whose_pages_are_too_large_are_left_out():
    """For all kinds of page, so that each row has its dense one."""
    small = fused_backend(PageLayout.of("q4_0", "q2_0", 64, 2, 16), LazyTarget())
    dense_bytes = LAYERS * CONTEXT * 2 * (64 + 64) * 4
    limit = decode_timing.MEMORY_SHARE * dense_bytes
    shapes = ((1, CONTEXT), (2, CONTEXT))
    steps = list(time_steps([("dense", DENSE)], limit, shapes, LAYERS))
    assert [(step.pages, step.requests, step.context) for step in steps] == [("dense", 1, CONTEXT)]
    assert steps[0].bytes_read == dense_bytes
    rate = steps[0].bytes_read / (steps[0].milliseconds * 1e6)
    assert steps[0].gigabytes_per_second == pytest.approx(rate)
    both = [("dense", DENSE), ("q4_0/q2_0", small)]
    assert not list(time_steps(both, limit - 4, shapes, LAYERS))
