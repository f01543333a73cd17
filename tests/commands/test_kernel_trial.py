"""The doctor's trial: its own numbers are right, so what differs from them is wrong."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from vllm_metal.commands.kernel_trial import GROUP, Trial
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


@pytest.fixture(scope="module", params=[1, 17])
def trial(request) -> Trial:
    layout = PageLayout.of("q8_0", "q8_0", 64, 2, 16)
    return Trial(Launcher(layout, HostTarget()), request.param)


def test_expected_is_attention_over_the_keys_and_values(trial):
    """As far as 8 bits keep them."""
    split = 2, trial.length, 2, 64
    expected = trial.expected()
    assert expected.shape == (2, 1, 2 * GROUP, 64)
    for i in range(2):
        keys, values = (
            np.array(x.astype(mx.float32)).reshape(split)[i].swapaxes(0, 1)
            for x in (trial.keys, trial.values)
        )
        queries = np.array(trial.queries.astype(mx.float32))[i].swapaxes(0, 1)
        exact = reference.attention(queries, keys, values, 64**-0.5).swapaxes(0, 1)
        assert np.linalg.norm(expected[i] - exact) < 2e-2 * np.linalg.norm(exact)


def test_expected_sees_the_window_and_the_sinks():
    layout = PageLayout.of("q8_0", "q8_0", 64, 2, 16)
    trial = Trial(Launcher(layout, HostTarget()), 17, mx.bfloat16)
    got = np.array(trial.decode(trial.store(), window=3, sinks=trial.sinks).astype(mx.float32))
    expected = trial.expected(window=3, sinks=trial.sinks)
    assert np.linalg.norm(got - expected) < 8e-3 * np.linalg.norm(expected)
    for other in ({"window": 3}, {"sinks": trial.sinks}):
        assert np.linalg.norm(got - trial.expected(**other)) > 0.1 * np.linalg.norm(expected)


def test_a_wrong_bias_is_counted():
    layout = PageLayout.of("uint4", "q3_0", 64, 2, 16)
    trial = Trial(Launcher(layout, HostTarget()), 5)
    mx.eval(trial.store())
    assert trial.wrong_bytes() == 0
    pages = np.array(trial.pages)
    pages[trial.table[0, 0], layout.key_biases_offset // 2] ^= 1  # the first token's
    trial.pages = mx.array(pages)
    assert trial.wrong_bytes() == 1


def test_right_bytes_are_found_right_and_one_wrong_one_is_counted(trial):
    mx.eval(trial.store())
    assert trial.wrong_bytes() == 0
    token = (trial.length - 1) % trial.launcher.layout.block_size
    flipped = np.array(trial.pages)
    flipped[trial.table[-1, -1], token * 64 // 2] ^= 1
    kept, trial.pages = trial.pages, mx.array(flipped)
    assert trial.wrong_bytes() == 1
    trial.pages = kept


def test_the_last_request_is_dequantised(trial):
    keys, values = trial.dequantize(trial.store())
    for got, plain in zip((keys, values), trial.plain(), strict=True):
        assert got.shape == (2, trial.length, 64)
        np.testing.assert_allclose(
            np.array(got.astype(mx.float32)), np.array(plain[-1]), atol=2e-3 * 4
        )
