"""Compares the kernels of format pairs, and dense pages, with right answers on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.commands.decode_timing import DecodeStep
from vllm_metal.commands.kernel_trial import (
    QUERY_HEADS_PER_KV_HEAD,
    DenseTrial,
    KernelTrial,
    Trial,
    dense_backend,
)
from vllm_metal.metal_kernel_backend.host_target import (
    HostProgram,
    ProgramRecorder,
    compile_ahead,
)
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

LENGTHS, LENGTHS_ON_HOST = (1, 17, 300), (1, 70)
"""Tokens of a request: one, one more than a block of 16, and several blocks and a part of one; more
than one step of a split. Fewer where the CPU runs the kernels."""
WINDOW = 9
TOLERANCES = {mx.float16: 5e-3, mx.bfloat16: 8e-3}
"""Largest |kernel - oracle| / |oracle| by the type of queries, keys and values; keys and queries
are halves in the kernel."""
ORDER_SHAPE = (2, 7, 3)
"""Requests, tokens of each, and layers of a step that is run in one evaluation."""
DTYPES = tuple(TOLERANCES)
"""The first pair is checked in both types and with sinks, the others in the first type and without:
a type decides how a kernel loads and stores, sinks how it ends, and the formats all in between."""


@dataclass
class Check:
    """What was found about one format pair, or about dense pages."""

    pages: str
    seconds: float = 0.0
    """Of the first launches, which compile the kernels."""
    wrong_bytes: int = 0
    """Stored bytes that differ from the codec's."""
    error: float = 0.0
    """Largest relative error of attention, and of dequantised keys and values."""
    allowed: float = 0.0
    """Largest relative error that rounding explains, where `error` was found."""
    failure: str = ""
    """What is wrong, in one sentence; empty where the results are right."""


DENSE, DENSE_ON_OPERATIONS = "dense", "dense, MLX"
"""What the checks of dense pages are called: on the kernels, and on MLX operations."""


def check_dense(shape: LayerShape, block_size: int, target: Target | None = None) -> Check:
    """All checks of dense pages, in both types: on the kernels of `target`, or on MLX operations.

    The bytes that the kernels store are compared with those of the operations.
    """
    check = Check(DENSE if target else DENSE_ON_OPERATIONS)
    on_host = target is not None and target.name == "host"
    try:
        if on_host:
            compile_ahead(_dense_programs(shape, block_size))
        for dtype in DTYPES:
            start = time.perf_counter()
            for i, length in enumerate(LENGTHS_ON_HOST if on_host else LENGTHS):
                trial = DenseTrial(shape, block_size, length, dtype, target)
                _compare(check, dtype, trial.decode(), trial.expected())
                seen = trial.sinks, WINDOW
                _compare(check, dtype, trial.decode(*seen), trial.expected(*seen))
                for got, expected in zip(trial.read(), trial.plain(), strict=True):
                    _compare(check, dtype, got, np.array(expected))
                check.wrong_bytes += trial.wrong_bytes() if target else 0
                if check.wrong_bytes:
                    check.failure = (
                        f"{check.wrong_bytes} stored bytes differ from those of MLX operations"
                    )
                check.seconds += time.perf_counter() - start if i == 0 else 0
                check_broken_token(trial, trial.decode, check)
        check_order(dense_backend(shape, block_size, DTYPES[0], target), check)
    except Exception as error:
        check.failure = f"{type(error).__name__}: {str(error)[:2000]}"
    return check


def fused_backend(layout: PageLayout, target: Target) -> TurboQuantFused:
    """The server's backend for the kernels of one layout, with keys that are not calibrated."""
    shape = LayerShape(layout.num_kv_heads, layout.key_head_size, layout.value_head_size)
    constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
    formats = FormatPair(layout.key_format, layout.value_format)
    return TurboQuantFused(shape, layout.block_size, formats, constants, target)


def check_kernels(layouts: dict[str, PageLayout], target: Target) -> list[Check]:
    """Compiles and checks the kernels of every pair."""
    checks, pairs = [], list(layouts)
    for i, (pair, layout) in enumerate(layouts.items()):
        if target.name == "host":  # while this pair is checked, the next one is compiled
            for ahead in range(i, min(i + 2, len(pairs))):
                compile_ahead(_programs(layouts[pairs[ahead]], thorough=ahead == 0))
        checks.append(check_pair(pair, layout, target, thorough=i == 0))
    return checks


def check_pair(pair: str, layout: PageLayout, target: Target, thorough: bool = True) -> Check:
    """All checks of one pair; whatever a compiler or a driver raises is a finding."""
    check = Check(pair)
    try:
        backend = fused_backend(layout, target)
        for dtype in DTYPES if thorough else DTYPES[:1]:
            start = time.perf_counter()
            lengths = LENGTHS_ON_HOST if target.name == "host" else LENGTHS
            for i, length in enumerate(lengths):
                check_trial(KernelTrial(backend.launcher, length, dtype), check, thorough)
                check.seconds += time.perf_counter() - start if i == 0 else 0
            if thorough and (matrices := matrix_launcher(backend.launcher)):
                check_trial(KernelTrial(matrices, lengths[-1], dtype), check)
        check_order(backend, check)
    except Exception as error:
        check.failure = f"{type(error).__name__}: {str(error)[:2000]}"
    return check


def matrix_launcher(launcher: Launcher) -> Launcher | None:
    """One that multiplies matrices also with the query heads of a trial, where layers with more
    query heads do; None where the trials run that form by themselves, or no layer does."""
    form = launcher.matrix
    if form is None or form.least_rows <= QUERY_HEADS_PER_KV_HEAD:
        return None
    return Launcher(launcher.layout, launcher.target, matrix=replace(form, least_rows=1))


def check_order(backend: AttentionBackend, check: Check) -> None:
    """Layers that store and attend in one evaluation give what they give one after the other."""
    together, apart = (
        DecodeStep(
            backend, *ORDER_SHAPE, heads=QUERY_HEADS_PER_KV_HEAD * backend.shape.num_kv_heads
        )
        for _ in range(2)
    )
    output = together.evaluated()
    expected = np.array(apart.build(evaluate=mx.eval).astype(mx.float32))
    _compare(check, mx.float16, output, expected)


def check_trial(trial: KernelTrial, check: Check, thorough: bool = True) -> None:
    """Stores, attends in full and in a window, with sinks too if `thorough`, and dequantises."""
    token = trial.store()
    settings = [{}, {"window": WINDOW}] + [{"window": WINDOW, "sinks": trial.sinks}] * thorough
    results = [(trial.decode(token, **each), trial.expected(**each)) for each in settings]
    plain = [np.array(part[-1]) for part in trial.plain()]
    results += zip(trial.dequantize(token), plain, strict=True)
    for got, expected in results:
        _compare(check, trial.dtype, got, expected)
    check.wrong_bytes += trial.wrong_bytes(token)
    if check.wrong_bytes:
        check.failure = f"{check.wrong_bytes} stored bytes differ from those of the codec"
    if thorough:
        check_broken_token(trial, lambda: trial.decode(trial.store()), check)


def check_broken_token(trial: Trial, decode: Callable[[], mx.array], check: Check) -> None:
    """A key that is not finite makes the output of its own request NaN, and of no other.

    `decode` stores the trial's keys and values and attends to them. An earlier finding stands.
    """
    if check.failure:
        return
    expected = trial.expected()
    trial.break_last_key()
    outputs = np.array(decode().astype(mx.float32))
    _compare(check, trial.dtype, mx.array(outputs[0]), expected[0])
    if not np.isnan(outputs[-1, :QUERY_HEADS_PER_KV_HEAD]).all():
        check.failure = "a key that is not finite gives an output that is"


def _compare(check: Check, dtype: mx.Dtype, got: mx.array, expected: np.ndarray) -> None:
    difference = np.array(got.astype(mx.float32)) - expected
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    error, allowed = error if np.isfinite(error) else float("inf"), TOLERANCES[dtype]
    if not check.allowed or error / allowed > check.error / check.allowed:
        check.error, check.allowed = error, allowed
    if not error < allowed:
        check.failure = (
            f"the results have a relative error of {error:.1e}, and rounding explains "
            f"{allowed:.1e} at most"
        )


def _dense_programs(shape: LayerShape, block_size: int) -> list[HostProgram]:
    """What `check_dense` compiles on the CPU."""
    recorder = ProgramRecorder()
    for dtype in DTYPES:
        trial = DenseTrial(shape, block_size, 1, dtype, recorder)
        trial.decode()
        trial.decode(sinks=trial.sinks)
        trial.read()
    return recorder.programs


def _programs(layout: PageLayout, thorough: bool) -> list[HostProgram]:
    """What `check_pair` compiles on the CPU."""
    recorder = ProgramRecorder()
    launcher = Launcher(layout, recorder)
    launchers = launcher, *filter(None, [matrix_launcher(launcher)] * thorough)
    for dtype, each in product(DTYPES if thorough else DTYPES[:1], launchers):
        trial = KernelTrial(each, 1, dtype)
        token = trial.store()
        trial.decode(token)
        trial.dequantize(token)
        if thorough:
            trial.decode(token, sinks=trial.sinks)
    return recorder.programs
