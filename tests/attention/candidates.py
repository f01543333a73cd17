"""Every backend that is held to the contract. A new one is right when its line here passes."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from tests.metal_kernel_backend.lazy_target import COMPILER, LazyTarget
from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.machine.device import DEVICE_VARIABLE
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

Make = Callable[[LayerShape, int], AttentionBackend]
"""A backend for a layer shape and a block size."""


@dataclass(frozen=True)
class Candidate:
    """One backend under the contract."""

    name: str
    make: Make
    tolerance: float
    """Largest error of an attention output, as a part of the largest value attended to."""
    device: mx.DeviceType = mx.cpu
    """Where it runs."""

    def __str__(self) -> str:
        return self.name

    @property
    def rounding(self) -> float:
        """Largest difference between a request's output in a batch and alone.

        A GPU sums in another order where there are more rows.
        """
        return 2e-6 if self.device == mx.cpu else 1e-3


def dense(dtype: mx.Dtype, target: Target | None = None) -> Make:
    def make(shape: LayerShape, block_size: int) -> AttentionBackend:
        arguments = shape, block_size, dtype
        return DenseFused(*arguments, target) if target else DensePages(*arguments)

    return make


def turboquant(pair: str, target: Target | None = None) -> Make:
    def make(shape: LayerShape, block_size: int) -> AttentionBackend:
        constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
        arguments = shape, block_size, parse_pair(pair), constants
        return TurboQuantFused(*arguments, target) if target else TurboQuantReference(*arguments)

    return make


def target_of_this_machine() -> Target | None:
    """The kernel target of its GPU, whatever device other tests have made the default."""
    if not mx.is_available(mx.gpu) or os.environ.get(DEVICE_VARIABLE) == "cpu":
        return None
    default = mx.default_device()
    mx.set_default_device(mx.gpu)
    target = available_target()
    mx.set_default_device(default)
    return target


CANDIDATES = [
    Candidate("dense-float32", dense(mx.float32), 2e-6),
    Candidate("dense-float16", dense(mx.float16), 1e-3),
    Candidate("dense-bfloat16", dense(mx.bfloat16), 8e-3),
    Candidate("operations-q8_0-q8_0", turboquant("q8_0/q8_0"), 1e-2),
    Candidate("operations-q8_0-q3_0", turboquant("q8_0/q3_0"), 0.3),
    Candidate("operations-uint4-q4_0", turboquant("uint4/q4_0"), 0.2),
    Candidate("host-dense-float32", dense(mx.float32, HostTarget()), 2e-6),
    Candidate("host-dense-float16", dense(mx.float16, HostTarget()), 1e-3),
    Candidate("host-dense-bfloat16", dense(mx.bfloat16, HostTarget()), 8e-3),
    Candidate("host-q8_0-q8_0", turboquant("q8_0/q8_0", HostTarget()), 1e-2),
    Candidate("host-q8_0-q3_0", turboquant("q8_0/q3_0", HostTarget()), 0.3),
]

if COMPILER is not None:  # the same programs, run when MLX evaluates
    CANDIDATES += [
        Candidate("lazy-dense-float32", dense(mx.float32, LazyTarget()), 2e-6),
        Candidate("lazy-dense-bfloat16", dense(mx.bfloat16, LazyTarget()), 8e-3),
        Candidate("lazy-q8_0-q3_0", turboquant("q8_0/q3_0", LazyTarget()), 0.3),
    ]

if (TARGET := target_of_this_machine()) is not None:
    CANDIDATES += [
        Candidate("gpu-dense-float16", dense(mx.float16), 2e-3, mx.gpu),
        Candidate("gpu-dense-bfloat16", dense(mx.bfloat16), 8e-3, mx.gpu),
        Candidate(f"{TARGET.name}-dense-float16", dense(mx.float16, TARGET), 2e-3, mx.gpu),
        Candidate(f"{TARGET.name}-dense-bfloat16", dense(mx.bfloat16, TARGET), 8e-3, mx.gpu),
        Candidate(f"{TARGET.name}-q8_0-q8_0", turboquant("q8_0/q8_0", TARGET), 1e-2, mx.gpu),
        Candidate(f"{TARGET.name}-q8_0-q3_0", turboquant("q8_0/q3_0", TARGET), 0.3, mx.gpu),
    ]
