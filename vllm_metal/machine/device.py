"""Which MLX device serves, and how much memory it has.

`VLLM_METAL_DEVICE` chooses: `auto` (default) takes the GPU where MLX has one, `metal` and `cuda`
insist on that GPU backend, `cpu` takes MLX's CPU backend.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from vllm_metal.errors import UserError

DEVICE_VARIABLE = "VLLM_METAL_DEVICE"
DEVICE_CHOICES = ("auto", "metal", "cuda", "cpu")

HOST_RESERVE = 2 << 30
"""Bytes left to Python, torch and the rest of the machine where MLX shares the RAM as a CPU."""

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def requested_device() -> str:
    """The value of `VLLM_METAL_DEVICE`.

    Raises:
        UserError: the value is none of `DEVICE_CHOICES`.
    """
    value = os.environ.get(DEVICE_VARIABLE, "auto")
    if value not in DEVICE_CHOICES:
        allowed = ", ".join(DEVICE_CHOICES)
        raise UserError(f"{DEVICE_VARIABLE}={value!r} is not known (allowed: {allowed})")
    return value


def machine_memory() -> int:
    """Bytes of RAM that this process may use: the machine's, or its cgroup's where smaller."""
    limit = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


@dataclass(frozen=True)
class Device:
    """The MLX device of this process."""

    kind: str
    """`metal`, `cuda` or `cpu`."""
    name: str
    """What the user calls it, e.g. `Apple M4 Max`."""
    memory_limit: int
    """Bytes that may be planned with: Metal's recommended working set, a CUDA card's memory, or
    on the CPU what the machine or its cgroup allows."""
    memory_in_use: int
    """Bytes of that limit that are not for MLX: what others hold at start, and a reserve."""


def select_device() -> Device:
    """Makes the requested MLX device the default one of this process.

    Raises:
        UserError: the requested device does not exist here.
    """
    import mlx.core as mx

    requested = requested_device()
    found = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"
    kind = found if requested == "auto" else requested
    if kind not in (found, "cpu"):
        raise UserError(
            f"{DEVICE_VARIABLE}={requested!r}, but the installed MLX has no {requested} backend "
            f"(it offers: {', '.join(dict.fromkeys((found, 'cpu')))})"
        )
    if kind == "cpu":
        mx.set_default_device(mx.cpu)
        limit = machine_memory()
        in_use = max(0, limit - psutil.virtual_memory().available) + HOST_RESERVE
        return Device(kind, f"{platform.machine()} CPU", limit, in_use)
    mx.set_default_device(mx.gpu)
    info = mx.device_info()
    name = str(info.get("device_name", kind))
    sizes = ("max_recommended_working_set_size", "total_memory", "memory_size")
    limit = next((int(info[size]) for size in sizes if info.get(size)), machine_memory())
    if kind == "metal":
        mx.set_wired_limit(limit)  # or macOS may page the weights of an idle server out
    return Device(kind, name, limit, 0)
