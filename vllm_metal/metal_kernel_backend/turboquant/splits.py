"""How the decode kernel's work is cut to fit a GPU: splits of the tokens, rows of a simdgroup."""

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


@lru_cache(maxsize=4096)
def splits(tokens: int, groups: int, slots: int) -> tuple[int, int]:
    """(tokens of a split, splits) for the longest request, at most 128 splits.

    `groups` threadgroups are needed per split, `slots` run at a time. One wave that fills them is
    best; where no number of splits gives one, about two and a half waves keep the ends even
    (measured on an H200, see docs/kernels.md).
    """
    steps = -(-max(tokens, 1) // SPLIT_STEP)
    count = slots // groups
    if count * groups < 0.9 * slots:
        count = round(2.6 * slots / groups)
    split_steps = -(-steps // max(1, min(count, steps, 128)))
    return split_steps * SPLIT_STEP, -(-steps // split_steps)


def resident_groups(rows: int) -> int:
    """Threadgroups that a core is to hold at a time, for `rows` query rows per simdgroup.

    A group is 128 threads. For up to 4 rows 3 groups leave 168 registers a thread on NVIDIA and
    128, all there are, on Apple GPUs before M3.
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
