"""Kernels on the CPU: what a simdgroup and a threadgroup are, in place writes, failures.

Also the same programs run when MLX evaluates (`LazyTarget`), and built for systems that the tests
do not run on.
"""

import subprocess
import sys
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from vllm_metal.metal_kernel_backend import host_target
from vllm_metal.metal_kernel_backend.host_target import (
    COMPILE_FLAGS,
    HostTarget,
    ProgramRecorder,
    host_source,
)
from vllm_metal.metal_kernel_backend.kernel_library import Kernel, Target
from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm
from vllm_metal.metal_kernel_backend.turboquant.kernels import KERNELS
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


def run(
    body: str,
    x: mx.array,
    threads: int = 64,
    threadgroups: int = 1,
    template=(),
    target: Target | None = None,
) -> mx.array:
    """One kernel with input x and an output of its size and type."""
    kernel = Kernel("probe", "", "", ("x",), ("y",), POSITION + body)
    return (target or HostTarget()).build(kernel)(
        inputs=[x],
        template=list(template),
        grid=(threads * threadgroups, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


POSITION = """
  uint lane = thread_index_in_simdgroup;
  uint local = simdgroup_index_in_threadgroup * 32 + lane;
  uint i = threadgroup_position_in_grid.x * 64 + local;
"""

X = mx.arange(128).astype(mx.float32)


def test_simdgroup_functions_see_the_32_lanes_of_their_simdgroup():
    x = np.array(X).reshape(4, 32)
    sums = run("y[i] = simd_sum(x[i]);", X, threadgroups=2)
    np.testing.assert_array_equal(np.array(sums).reshape(4, 32), x.sum(1, keepdims=True) + 0 * x)
    largest = run("y[i] = simd_max(-x[i]);", X, threadgroups=2)
    np.testing.assert_array_equal(np.array(largest).reshape(4, 32)[:, 0], -x[:, 0])
    swapped = run("y[i] = simd_shuffle_xor(x[i], 5);", X, threadgroups=2)
    np.testing.assert_array_equal(np.array(swapped).reshape(4, 32), x[:, np.arange(32) ^ 5])
    any_over_40 = run("y[i] = simd_any(x[i] > 40.0f) ? 1 : 0;", X, threadgroups=2)
    np.testing.assert_array_equal(np.array(any_over_40).reshape(4, 32)[:, 7], [0, 1, 1, 1])


def test_threadgroup_memory_is_shared_and_barriers_order_it():
    body = """
  threadgroup float shared[64];
  shared[local] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[63 - local];
"""
    y = np.array(run(body, X, threadgroups=2)).reshape(2, 64)
    np.testing.assert_array_equal(y, np.array(X).reshape(2, 64)[:, ::-1])


def test_templates_hold_types_and_numbers():
    x = mx.array([1.5, 2.5] * 32, mx.bfloat16)
    y = run("y[i] = T(float(x[i]) * N);", x, template=[("T", mx.bfloat16), ("N", 3)])
    assert y.dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(y.astype(mx.float32))[:2], [4.5, 7.5])


def test_a_kernel_may_write_through_its_input():
    x = mx.zeros((64,), mx.uint16)
    mx.eval(x)
    mx.eval(run("((ushort*)x)[i] = ushort(i); y[i] = 0;", x))
    np.testing.assert_array_equal(np.array(x), np.arange(64))


@pytest.mark.parametrize(
    "body",
    [
        "y[i] = 0; if (lane < 16) { y[i] = simd_sum(x[i]); }",
        "y[i] = 0; if (local < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); }",
    ],
)
def test_what_only_some_threads_reach_is_an_error(body):
    with pytest.raises(RuntimeError, match="only some of its threads"):
        run(body, X)


def test_compiled_kernels_are_kept_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.testing.assert_array_equal(np.array(run("y[i] = x[i] + 17.0f;", X, threadgroups=2)), X + 17)
    [kept] = (file for file in tmp_path.rglob("*") if file.is_file())
    assert kept.parent == tmp_path / "vllm_metal" / "host-kernels"
    assert kept.name.startswith("probe_")


def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch, tmp_path):
    recorder, commands = ProgramRecorder(), []
    body = "y[i] = x[i] + 19.0f;"
    run(body, X, target=recorder)
    monkeypatch.setattr(
        host_target.subprocess,
        "run",
        lambda command, real=subprocess.run, **arguments: (
            commands.append(command) or real(command, **arguments)
        ),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host_target.compile_ahead(recorder.programs)
    np.testing.assert_array_equal(np.array(run(body, X, threadgroups=2)), X + 19)
    assert len(commands) == 1


def test_a_kernel_that_does_not_compile_is_an_error():
    with pytest.raises(RuntimeError, match="does not compile"):
        run("y[i] = undeclared;", X)


THROUGH = "((ushort*)x)[i] = ushort(i + 1); y[i] = 0;"
"""Writes through its input."""


@needs_lazy_target
def test_a_lazy_kernel_runs_when_its_output_is_evaluated():
    """Its write through an input is not there before, and MLX does not know of it."""
    x = mx.zeros((64,), mx.uint16)
    mx.eval(x)
    y = run(THROUGH, x, target=LazyTarget())
    mx.eval(x + 0)
    assert not np.array(x).any()
    mx.eval(y)
    np.testing.assert_array_equal(np.array(x), np.arange(64) + 1)


@needs_lazy_target
def test_a_lazy_kernel_is_traced_and_replayed():
    @mx.compile
    def traced(x):
        return run("y[i] = x[i] * x[i];", x + 1, threadgroups=2, target=LazyTarget()) - 1

    for x in (X, 2 * X):
        np.testing.assert_array_equal(np.array(traced(x)), np.array(x + 1) ** 2 - 1)


@needs_lazy_target
def test_what_only_some_threads_of_a_lazy_kernel_reach_is_an_error():
    body = "y[i] = 0; if (lane < 16) { y[i] = simd_sum(x[i]); }"
    y = run(body, X, target=LazyTarget())
    with pytest.raises(RuntimeError, match="only some threads"):
        mx.eval(y)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(host_target.shutil, "which", lambda _: None)
    monkeypatch.setitem(host_target.sys.modules, "ziglang", None)
    host_target.host_compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="install g"):
            host_target.host_compiler()
    finally:
        host_target.host_compiler.cache_clear()


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("folder", ["/usr/bin", "/opt/homebrew/bin"])
@pytest.mark.parametrize("tools", ["", "/no/such/folder", "existing"])
def test_a_command_that_only_offers_to_install_the_compiler_is_none(
    monkeypatch, tmp_path, system, folder, tools
):
    """`xcode-select` fails without Apple's tools; it may name a folder that has been deleted."""
    printed = str(tmp_path) if tools == "existing" else tools
    asked = []

    def xcode_select(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0 if printed else 2, f"{printed}\n")

    monkeypatch.setattr(host_target.platform, "system", lambda: system)
    monkeypatch.setattr(host_target.shutil, "which", lambda name: f"{folder}/{name}")
    monkeypatch.setattr(host_target.subprocess, "run", xcode_select)
    on_trial = system == "Darwin" and folder == "/usr/bin"
    compiles = not on_trial or tools == "existing"
    assert host_target.find_compiler("c++") == (f"{folder}/c++" if compiles else None)
    assert asked == ([["/usr/bin/xcode-select", "--print-path"]] if on_trial else [])


def test_no_command_is_no_compiler():
    assert host_target.find_compiler("no-such-compiler") is None


@cache
def kernel_programs() -> dict[str, str]:
    """The program of each kernel, for one layer of 2 KV heads of size 128."""
    target = ProgramRecorder()
    layout = PageLayout.of("q8_0", "q3_0", 128, 2, 16)
    launcher = Launcher(layout, target, num_cores=8)
    pages, new = mx.zeros(layout.pages_shape(4), mx.uint16), mx.zeros((1, 2, 128), mx.float16)
    heads, size, slots = mx.zeros((2, 128)), mx.zeros((128,)), mx.zeros((1,), mx.int32)
    constants = LayerConstants(heads, heads, heads, size)
    token = launcher.store(pages, new, new, slots, constants)
    queries, table = mx.zeros((1, 1, 8, 128), mx.float16), mx.zeros((1, 3), mx.int32)
    for form in (None, MatrixForm(1, 8, 6)):
        launcher = Launcher(layout, target, num_cores=8, matrix=form)
        launcher.decode(pages, queries, table, slots, constants, 0.1, 400, token)
    launcher.read(pages, table[0], constants, 0, 3, token, mx.float16)
    return {program.kernel.name: host_source(program) for program in target.programs}


LIBRARY_STUBS = """
void* operator new[](unsigned long size) { return std::malloc(size); }
void operator delete[](void* memory) noexcept { std::free(memory); }
"""
"""What the programs take from the C++ library: zig would build that first, for minutes."""


@pytest.mark.parametrize(
    "system",
    ["aarch64-macos", pytest.param("aarch64-linux-gnu", marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda x: x.name)
def test_the_kernels_build_for_other_systems(kernel, system, tmp_path):
    pytest.importorskip("ziglang", reason="the cross compiler comes from ziglang (extra: test)")
    zig, target = [sys.executable, "-m", "ziglang"], ["-target", system]
    program, built = kernel_programs()[kernel.name] + LIBRARY_STUBS, tmp_path / "built.o"
    flags = [flag for flag in COMPILE_FLAGS if flag != "-shared"]
    link = ["build-lib", *target, "-dynamic", "-lc", "-z", "defs", built]
    link += ["-fno-compiler-rt", "-fno-ubsan-rt"]
    for command, source in [
        (["c++", *target, "-c", *flags, "-o", built], program),
        ([*link, f"-femit-bin={tmp_path / 'linked.so'}"], None),
    ]:
        result = subprocess.run([*zig, *command], input=source, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
