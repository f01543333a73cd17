"""How the decode kernel's work is cut to fit a GPU: splits of the tokens, rows of a simdgroup."""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import Target

SPLIT_STEP = 64
"""Tokens; a split is a multiple. A threadgroup reads as many at once at head size 128."""

APPLE_CORES = {"p": 6, "g": 20, "s": 40, "d": 80}
"""The most cores of the GPUs whose architecture ends in this letter: phones, M and Pro, Max, Ultra.
MLX tells no number of cores; splitting for too many costs little."""

CUDA_CORES = 132
"""Assumed where MLX does not tell."""


@dataclass(frozen=True)
class DecodePlan:
    """How the query rows of a KV head and the tokens of a request are cut."""

    rows: int
    """Query rows that one simdgroup serves."""
    tiles: int
    """Times `rows`, at least all query rows of a KV head."""
    split_tokens: int
    num_splits: int


def plan_decode(
    query_rows: int, kv_heads: int, tokens: int, max_rows: int, num_cores: int
) -> DecodePlan:
    """The plan of one decode step.

    Args:
        query_rows: of a KV head: its query heads times the query tokens of a request.
        kv_heads: of all requests together.
        tokens: that the rows of the longest request see.
        max_rows: query rows that a simdgroup serves at most.
        num_cores: of the GPU.
    """
    tiles = -(-query_rows // max_rows)
    rows = -(-query_rows // tiles)
    resident = num_cores * resident_threadgroups(rows)
    return DecodePlan(rows, tiles, *splits(tokens, kv_heads * tiles, resident))


@lru_cache(maxsize=4096)
def splits(tokens: int, threadgroups: int, resident: int) -> tuple[int, int]:
    """(tokens of a split, splits) for the longest request, at most 128 splits.

    `threadgroups` are needed per split, `resident` of them run at a time. One wave that fills the
    GPU is best; where no number of splits gives one, about two and a half waves keep the ends even
    (measured on an H200, see docs/kernels.md).
    """
    steps = -(-max(tokens, 1) // SPLIT_STEP)
    count = resident // threadgroups
    if count * threadgroups < 0.9 * resident:
        count = round(2.6 * resident / threadgroups)
    split_steps = -(-steps // max(1, min(count, steps, 128)))
    return split_steps * SPLIT_STEP, -(-steps // split_steps)


def resident_threadgroups(rows: int) -> int:
    """Threadgroups that a core is to hold at a time, for `rows` query rows per simdgroup.

    A threadgroup is 128 threads. For up to 4 rows 3 threadgroups leave 168 registers a thread on
    NVIDIA and 128, all there are, on Apple GPUs before M3.
    """
    return 3 if rows <= 4 else 2


def core_count(target: Target) -> int:
    """Cores of the GPU that `target` runs on."""
    if target.name == "host":
        return 1
    info = mx.device_info()
    for key in ("multi_processor_count", "gpu_core_count"):
        if key in info:
            return int(info[key])
    if target.name == "cuda":
        return CUDA_CORES
    return APPLE_CORES.get(_architecture()[-1:], APPLE_CORES["s"])


def rows_per_simdgroup(target: Target) -> int:
    """Query rows that a simdgroup serves at most, by the registers of the GPU.

    Apple GPUs up to M2 (architectures g13 and g14) have 128 registers a thread, later ones take
    more from their cache.
    """
    if target.name != "metal":
        return 8
    return 4 if any(name in _architecture() for name in ("g13", "g14")) else 8


def _architecture() -> str:
    """Of an Apple GPU, e.g. `applegpu_g14s`."""
    return str(mx.device_info().get("architecture", ""))
