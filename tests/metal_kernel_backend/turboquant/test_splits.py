"""How work is cut: every token once, every core busy, no more rows than registers hold."""

import pytest

from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget, MetalTarget
from vllm_metal.metal_kernel_backend.turboquant import splits as module
from vllm_metal.metal_kernel_backend.turboquant.splits import Gpu, plan_decode, splits

STEPS = (32, 64)
"""Of Apple GPUs and of the others."""


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 5000, 131_072])
@pytest.mark.parametrize("threadgroups", [1, 8, 64, 1000])
@pytest.mark.parametrize("step", STEPS)
def test_splits_cover_every_token_and_none_is_empty(tokens, threadgroups, step):
    size, count = splits(tokens, threadgroups, 396, step)
    assert size % step == 0
    assert size * count >= tokens
    assert count == 1 or size * (count - 1) < tokens
    assert count <= 128


def test_a_long_request_alone_fills_the_gpu_once():
    _, count = splits(131_072, 8, 396, 64)
    assert 0.9 * 396 <= 8 * count <= 396


def test_many_requests_are_not_split_into_one_more_wave():
    size, count = splits(8192, 256, 396, 64)
    waves = -(-256 * count // 396)
    assert waves * size <= 8192 * 0.75


@pytest.mark.parametrize("step", STEPS)
def test_short_requests_are_not_split(step):
    assert splits(step, 8, 396, step) == (step, 1)


def gpu_of(target, cores: int, monkeypatch) -> Gpu:
    monkeypatch.setattr(module, "core_count", lambda _: cores)
    return Gpu.of(target)


@pytest.mark.parametrize("query_rows", range(1, 65))
def test_on_apple_gpus_a_simdgroup_serves_at_most_four_rows(query_rows, monkeypatch):
    gpu = gpu_of(MetalTarget(), 16, monkeypatch)
    plan = plan_decode(gpu, query_rows, 8, 4096)
    assert plan.rows <= 4 and plan.rows * plan.tiles >= query_rows


def test_where_registers_allow_it_eight_heads_share_their_keys(monkeypatch):
    gpu = gpu_of(CudaTarget(), 132, monkeypatch)
    assert plan_decode(gpu, 8, 8, 4096).rows == 8
    assert (gpu.resident_threadgroups(4), gpu.resident_threadgroups(5)) == (3, 2)


def test_one_request_fills_the_simdgroups_of_an_apple_gpu(monkeypatch):
    """24 simdgroups a core, 6 threadgroups: 8 KV heads of 8,192 tokens on the 40 cores of a Max."""
    gpu = gpu_of(MetalTarget(), 40, monkeypatch)
    plan = plan_decode(gpu, 4, 8, 8192)
    assert 0.85 * 24 * 40 <= 8 * plan.num_splits * module.DECODE_SIMDGROUPS <= 24 * 40
    assert plan.split_tokens % 32 == 0


def test_the_cpu_is_one_core():
    assert Gpu.of(HostTarget()).cores == 1
