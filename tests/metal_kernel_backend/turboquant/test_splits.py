"""How work is cut: every token once, every core busy."""

import mlx.core as mx
import pytest

from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import MetalTarget
from vllm_metal.metal_kernel_backend.turboquant.splits import (
    SPLIT_STEP,
    core_count,
    rows_per_simdgroup,
    splits,
)


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 5000, 131_072])
@pytest.mark.parametrize("threadgroups", [1, 8, 64, 1000])
def test_splits_cover_every_token_and_none_is_empty(tokens, threadgroups):
    size, count = splits(tokens, threadgroups, 396)
    assert size % SPLIT_STEP == 0
    assert size * count >= tokens
    assert count == 1 or size * (count - 1) < tokens
    assert count <= 128


def test_a_long_request_alone_fills_the_gpu_once():
    _, count = splits(131_072, 8, 396)
    assert 0.9 * 396 <= 8 * count <= 396


def test_many_requests_are_not_split_into_one_more_wave():
    size, count = splits(8192, 256, 396)
    waves = -(-256 * count // 396)
    assert waves * size <= 8192 * 0.75


def test_short_requests_are_not_split():
    assert splits(SPLIT_STEP, 8, 396) == (SPLIT_STEP, 1)


@pytest.mark.parametrize(
    ("architecture", "cores", "rows"),
    [
        ("applegpu_g13g", 20, 4),
        ("applegpu_g14s", 40, 4),
        ("applegpu_g15d", 80, 8),
        ("applegpu_g17", 40, 8),
        ("", 40, 8),
    ],
)
def test_apple_gpus_are_known_by_their_architecture(monkeypatch, architecture, cores, rows):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    assert core_count(MetalTarget()) == cores
    assert rows_per_simdgroup(MetalTarget()) == rows


def test_the_cpu_is_one_core_and_keeps_eight_rows():
    assert core_count(HostTarget()) == 1
    assert rows_per_simdgroup(HostTarget()) == 8
