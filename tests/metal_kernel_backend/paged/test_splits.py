"""How work is cut: every token once, every core busy, no more rows than registers hold."""

import pytest

from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget, MetalTarget
from vllm_metal.metal_kernel_backend.paged import splits as module
from vllm_metal.metal_kernel_backend.paged.splits import Gpu, MatrixForm, plan_decode, splits

STEPS = (16, 32, 64)
"""Of Apple GPUs and of the others, for dense and compressed pages."""


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


@pytest.mark.parametrize(("target", "most"), [(MetalTarget(), 256), (CudaTarget(), 512)])
@pytest.mark.parametrize("form", [None, MatrixForm(1, 16, 4)])
def test_up_to_some_hundred_tokens_are_one_split(target, most, form, monkeypatch):
    """There is nothing to merge, so a step has one launch less for each layer."""
    gpu = gpu_of(target, 132, monkeypatch)
    for tokens in (0, 1, 65, most):
        plan = plan_decode(gpu, 4, 8, tokens, form)
        assert plan.num_splits == 1 and plan.split_tokens >= tokens
    assert plan_decode(gpu, 4, 8, most + 1, form).num_splits > 1


def gpu_of(target, cores: int, monkeypatch, lane_elements: int = 16) -> Gpu:
    monkeypatch.setattr(module, "core_count", lambda _: cores)
    return Gpu.of(target, lane_elements)


@pytest.mark.parametrize("lane_elements", [8, 16])
@pytest.mark.parametrize("query_rows", range(1, 65))
def test_on_apple_gpus_a_simdgroup_serves_at_most_four_rows(query_rows, lane_elements, monkeypatch):
    gpu = gpu_of(MetalTarget(), 16, monkeypatch, lane_elements)
    plan = plan_decode(gpu, query_rows, 8, 4096)
    assert plan.rows <= 4 and plan.rows * plan.tiles >= query_rows


def test_where_registers_allow_it_eight_heads_share_their_keys(monkeypatch):
    gpu = gpu_of(CudaTarget(), 132, monkeypatch)
    assert plan_decode(gpu, 8, 8, 4096).rows == 8
    assert (gpu.resident_threadgroups(4), gpu.resident_threadgroups(5)) == (3, 2)


def test_half_the_elements_of_a_lane_leave_room_for_one_more_threadgroup(monkeypatch):
    gpu = gpu_of(CudaTarget(), 132, monkeypatch, lane_elements=8)
    assert plan_decode(gpu, 8, 8, 4096).rows == 8
    assert (gpu.resident_threadgroups(4), gpu.resident_threadgroups(5)) == (4, 3)


@pytest.mark.parametrize(("target", "lane_elements", "step"), [
    (MetalTarget, 16, 32), (MetalTarget, 8, 16), (CudaTarget, 16, 64), (CudaTarget, 8, 32),
])  # fmt: skip
def test_a_split_is_a_multiple_of_what_a_threadgroup_reads_at_a_time(
    target, lane_elements, step, monkeypatch
):
    assert gpu_of(target(), 10, monkeypatch, lane_elements).split_step == step


CHIPS = {
    "M1": 8,
    "M4": 10,
    "M4 Pro": 20,
    "M1 Max": 32,
    "M4 Max": 40,
    "M1 Ultra": 64,
    "M3 Ultra": 80,
}
"""GPU cores. A core holds 24 simdgroups, 6 threadgroups."""


def wave(chip: str, tokens: int, monkeypatch) -> tuple[int, int, float]:
    """One request with 8 KV heads: waves, steps of each, and the part of the simdgroups in use."""
    gpu = gpu_of(MetalTarget(), CHIPS[chip], monkeypatch)
    plan = plan_decode(gpu, 4, 8, tokens)
    threadgroups, resident = 8 * plan.num_splits, 6 * CHIPS[chip]
    assert gpu.split_step == 32
    return -(-threadgroups // resident), plan.split_tokens // 32, threadgroups / resident


@pytest.mark.parametrize("tokens", [1024, 2048, 8192, 32_768])
@pytest.mark.parametrize("chip", CHIPS)
def test_one_request_takes_no_more_steps_than_an_apple_gpu_must(chip, tokens, monkeypatch):
    """Steps one after the other: at most 15 % more than all steps over all that run at a time."""
    waves, steps, _ = wave(chip, tokens, monkeypatch)
    least = -(-8 * tokens // 32 // (6 * CHIPS[chip]))
    assert waves * steps <= max(least, 1.15 * least)


@pytest.mark.parametrize(
    ("chip", "tokens", "filled"),
    [
        ("M1 Max", 8192, 1.0),
        ("M4 Max", 8192, 0.97),
        ("M3 Ultra", 8192, 0.87),
        ("M1 Max", 1024, 0.67),
        ("M4 Max", 1024, 0.53),
        ("M3 Ultra", 1024, 0.53),
    ],
)
def test_the_part_of_an_apple_gpu_that_one_request_fills(chip, tokens, filled, monkeypatch):
    """1,024 tokens are 256 steps of a threadgroup: an Ultra holds 480, a Max 192 or 240, which do
    two steps each in one wave."""
    waves, _, part = wave(chip, tokens, monkeypatch)
    assert waves == 1 and round(part, 2) == filled


@pytest.mark.parametrize(
    ("target", "head_size", "form"),
    [
        (CudaTarget(), 128, MatrixForm(1, 16, 4)),
        (CudaTarget(), 192, MatrixForm(1, 8, 2)),
        (MetalTarget(), 128, MatrixForm(5, 8, 6)),
        (MetalTarget(), 192, None),
        (HostTarget(), 64, MatrixForm(5, 8, 6)),
    ],
)
def test_where_decode_multiplies_matrices(target, head_size, form):
    assert MatrixForm.of(target, head_size) == form


@pytest.mark.parametrize("query_rows", range(1, 65))
def test_the_matrix_form_has_room_for_eight_rows(query_rows, monkeypatch):
    """On Apple GPUs from 5 on; up to 4 nothing changes."""
    gpu = gpu_of(MetalTarget(), 16, monkeypatch)
    plan = plan_decode(gpu, query_rows, 8, 4096, MatrixForm(5, 8, 6))
    if query_rows < 5:
        assert plan == plan_decode(gpu, query_rows, 8, 4096) and not plan.matrix
        return
    assert plan.matrix and plan.rows <= 8 and plan.tiles == -(-query_rows // 8)
    assert plan.rows * plan.tiles >= query_rows and plan.split_tokens % 32 == 0


def test_each_form_is_cut_for_the_threadgroups_that_it_leaves_room_for(monkeypatch):
    gpu = gpu_of(CudaTarget(), 132, monkeypatch)
    for form in (None, MatrixForm(1, 16, 4), MatrixForm(1, 8, 2)):
        plan = plan_decode(gpu, 4, 8, 131_072, form)
        assert plan.resident == (form.threadgroups_per_core if form else 3)
        assert 0.9 * 132 * plan.resident <= 8 * plan.num_splits <= 132 * plan.resident


def test_the_cpu_is_one_core():
    assert Gpu.of(HostTarget(), 16).cores == 1
