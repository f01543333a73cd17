"""The doctor's trials: their own numbers are right, so what differs from them is wrong."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.attention.backend import LayerShape
from vllm_metal.commands.kernel_trial import (
    QUERY_HEADS_PER_KV_HEAD,
    REQUESTS,
    DenseTrial,
    KernelTrial,
)
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

LAYOUT = PageLayout.of("q8_0", "q8_0", 64, 2, 16)
SHAPE = LayerShape(2, 64, 64)


@pytest.fixture(scope="module", params=[1, 17])
def trial(request) -> KernelTrial:
    return KernelTrial(Launcher(LAYOUT, HostTarget()), request.param)


def distance(got: mx.array | np.ndarray, expected: np.ndarray) -> float:
    got = np.array(got.astype(mx.float32)) if isinstance(got, mx.array) else got
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def attention(trial, window: int = 0) -> np.ndarray:
    """Float32 attention over the trial's own keys and values, [2, Hq, D]."""
    outputs = []
    for i in range(REQUESTS):
        split = REQUESTS, trial.length, 2, 64
        keys, values = (
            np.array(x.astype(mx.float32)).reshape(split)[i].swapaxes(0, 1)
            for x in (trial.keys, trial.values)
        )
        queries = np.array(trial.queries.astype(mx.float32))[i][:, None]
        outputs.append(reference.attention(queries, keys, values, 64**-0.5, None, window)[:, 0])
    return np.stack(outputs)


def test_expected_is_attention_over_the_keys_and_values(trial):
    """As far as 8 bits keep them."""
    expected = trial.expected()
    assert expected.shape == (REQUESTS, 2 * QUERY_HEADS_PER_KV_HEAD, 64)
    assert distance(expected, attention(trial)) < 2e-2


@pytest.mark.parametrize("window", [0, 5])
def test_dense_pages_are_expected_to_lose_nothing(window):
    trial = DenseTrial(SHAPE, 16, 17, mx.float16)
    assert distance(trial.expected(window=window), attention(trial, window)) < 1e-6
    assert distance(trial.decode(window=window), attention(trial, window)) < 2e-3


def test_sinks_and_windows_of_dense_pages():
    trial = DenseTrial(SHAPE, 16, 17, mx.bfloat16)
    settings = {"window": 3, "sinks": trial.sinks}
    got = trial.decode(**settings)
    assert distance(got, trial.expected(**settings)) < 8e-3
    for other in ({"window": 3}, {"sinks": trial.sinks}):
        assert distance(got, trial.expected(**other)) > 0.1


def test_expected_sees_the_window_and_the_sinks():
    trial = KernelTrial(Launcher(LAYOUT, HostTarget()), 17, mx.bfloat16)
    got = trial.decode(trial.store(), window=3, sinks=trial.sinks)
    assert distance(got, trial.expected(window=3, sinks=trial.sinks)) < 8e-3
    for other in ({"window": 3}, {"sinks": trial.sinks}):
        assert distance(got, trial.expected(**other)) > 0.1


def test_a_wrong_bias_is_counted():
    layout = PageLayout.of("uint4", "q3_0", 64, 2, 16)
    trial = KernelTrial(Launcher(layout, HostTarget()), 5)
    token = trial.store()
    assert trial.wrong_bytes(token) == 0
    pages = np.array(trial.pages)
    pages[trial.table[0, 0], layout.key_biases_offset // 2] ^= 1  # the first token's
    trial.pages = mx.array(pages)
    assert trial.wrong_bytes(token) == 1


def test_right_bytes_are_found_right_and_one_wrong_one_is_counted(trial):
    token = trial.store()
    assert trial.wrong_bytes(token) == 0
    last = (trial.length - 1) % trial.launcher.layout.block_size
    flipped = np.array(trial.pages)
    flipped[trial.table[-1, -1], last * 64 // 2] ^= 1
    kept, trial.pages = trial.pages, mx.array(flipped)
    assert trial.wrong_bytes(token) == 1
    trial.pages = kept


@needs_lazy_target
def test_bytes_are_read_once_they_are_stored():
    """On a GPU a store runs when MLX evaluates its token."""
    trial = KernelTrial(Launcher(LAYOUT, LazyTarget()), 17)
    token = trial.store()
    assert not np.array(trial.pages).any()
    assert trial.wrong_bytes(token) == 0
    assert np.array(trial.pages).any()


def test_the_last_request_is_dequantised(trial):
    keys, values = trial.dequantize(trial.store())
    for got, plain in zip((keys, values), trial.plain(), strict=True):
        assert got.shape == (2, trial.length, 64)
        np.testing.assert_allclose(
            np.array(got.astype(mx.float32)), np.array(plain[-1]), atol=2e-3 * 4
        )
