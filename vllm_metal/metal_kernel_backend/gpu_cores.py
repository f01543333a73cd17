"""How many cores a GPU has: what the kernels' work is divided among."""

import re
import subprocess
import sys
from functools import cache

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import Target

IOREG = ("/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1")
"""Prints what macOS knows of an Apple GPU."""

APPLE_CORES = {"p": 6, "g": 20, "s": 40, "d": 80}
"""Assumed by the last letter of an Apple GPU's architecture where macOS does not tell: the most
that a chip of the kind has. p phones, g base chips, s Pro and Max, d Ultra. A Pro has 14 to 20 and
is cut for 40 then, so its last wave of threadgroups may be half empty."""

CUDA_CORES = 132
"""Assumed where MLX does not tell."""


def core_count(target: Target) -> int:
    """Cores of the GPU that `target` runs on; 1 on the CPU."""
    if target.name == "host":
        return 1
    info = mx.device_info()
    for key in ("multi_processor_count", "gpu_core_count"):
        if key in info:
            return int(info[key])
    if target.name == "cuda":
        return CUDA_CORES
    architecture = str(info.get("architecture", ""))  # e.g. applegpu_g14s
    return _told_by_macos() or APPLE_CORES.get(architecture[-1:], APPLE_CORES["s"])


def parse_core_count(text: str) -> int | None:
    """The number of cores in what `IOREG` prints; None where it has none."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', text)
    return int(found.group(1)) if found else None


@cache
def _told_by_macos() -> int | None:
    if sys.platform != "darwin":
        return None
    try:
        result = subprocess.run(IOREG, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_core_count(result.stdout)
