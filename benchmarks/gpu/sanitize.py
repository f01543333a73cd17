"""Runs every kernel once on small odd shapes, for a sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/gpu/sanitize.py

Needs MLX and CuPy; reaches no network.
"""

import cupy as cp
import mlx.core as mx
import numpy as np
from cuda_program import Kind, launcher_of, layout_of, type_name
from cupy_target import CupyTarget

from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants as DenseConstants
from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW
from vllm_metal.metal_kernel_backend.turboquant.launcher import LayerConstants

CASES = (
    (("q8_0", "q3_0"), 128, 2, 16, 4, 1),
    (("q5_0", "q6_0"), 80, 1, 8, 6, 2),
    (("uint4", "q2_0"), 64, 3, 16, 3, 8),
    (("q4_0", "q5_0"), 256, 1, 32, 8, 1),
    (mx.float16, 128, 2, 16, 4, 1),
    (mx.float32, 80, 1, 8, 6, 2),
    (mx.float16, 36, 3, 16, 3, 8),
    (mx.float16, 5, 1, 8, 1, 1),
    (mx.float16, 512, 1, 32, 8, 1),
)
"""Formats or the type of dense pages, head size, KV heads, block size, query heads of a KV head and
query tokens. CuPy has no bfloat16: the tests of the contract run those pages."""


def run(kind: Kind, head_size, kv_heads, block_size, heads_per_kv_head, num_queries) -> float:
    layout = layout_of(kind, head_size, kv_heads, block_size)
    launcher = launcher_of(layout, CupyTarget())
    lengths = [num_queries, 700, block_size + 9]
    blocks = -(-max(lengths) // block_size)
    rng = np.random.default_rng(0)
    table = 1 + rng.permutation(3 * blocks).reshape(3, blocks).astype(np.int32)
    is_dense = isinstance(kind, mx.Dtype)
    dtype = type_name(kind) if is_dense else "uint16"
    pages = cp.zeros(layout.pages_shape(3 * blocks + 1), dtype)
    ones = cp.ones((kv_heads, head_size), cp.float32)
    constants = LayerConstants(0 * ones, ones, ones, cp.ones(head_size, cp.float32))
    if is_dense:
        constants = DenseConstants()
    token = cp.zeros(8, cp.uint32)
    for request, length in enumerate(lengths):
        positions = np.arange(length)
        slots = table[request][positions // block_size] * block_size + positions % block_size
        slots = _lengthened(slots, -1)
        new = cp.random.standard_normal((length, kv_heads, head_size)).astype(cp.float16)
        token = launcher.store(pages, new, new, cp.asarray(slots), constants, token)
    shape = 3, num_queries, heads_per_kv_head * kv_heads, head_size
    queries = cp.random.standard_normal(shape).astype(cp.float16)
    arguments = cp.asarray(table), cp.asarray(_lengthened(lengths, 0)), constants
    total = 0.0
    for settings in ({}, {"window": 37}, {"softcap": 9.0}):
        output = launcher.decode(
            pages, queries, *arguments, head_size**-0.5, max(lengths), token, **settings
        )
        total += _sum(output)
    for heads in (slice(None), slice(kv_heads - 1, kv_heads)):
        keys, values = launcher.read(
            pages, cp.asarray(table[1]), constants, 2, 695, token, np.dtype(np.float16), heads
        )
        total += _sum(keys) + _sum(values)
    return total


def _lengthened(integers, filler: int) -> np.ndarray:
    """As the launcher does it with MLX's arrays."""
    missing = max(0, CONSTANT_BELOW - len(integers))
    return np.pad(np.asarray(integers, np.int32), (0, missing), constant_values=filler)


def _sum(array: cp.ndarray) -> float:
    return float(cp.abs(array.astype(cp.float32)).sum())


def main() -> None:
    for case in CASES:
        total = run(*case)
        assert np.isfinite(total), case
        print(*case, total)


if __name__ == "__main__":
    main()
