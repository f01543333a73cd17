"""The folder of files that are made once and made again where they are missing.

It holds the demo model, kernels compiled for the CPU, and results measured when a server starts.
"""

import os
from pathlib import Path

from vllm_metal.errors import UserError

STARTUP_CACHE_VARIABLE = "VLLM_METAL_STARTUP_CACHE"
STARTUP_CACHE_CHOICES = ("on", "off")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vllm_metal`, or `~/.cache/vllm_metal`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm_metal"


def startup_cache() -> str:
    """The value of `VLLM_METAL_STARTUP_CACHE`, `on` by default.

    Raises:
        UserError: the value is none of `STARTUP_CACHE_CHOICES`.
    """
    value = os.environ.get(STARTUP_CACHE_VARIABLE, "on")
    if value not in STARTUP_CACHE_CHOICES:
        allowed = ", ".join(STARTUP_CACHE_CHOICES)
        raise UserError(f"{STARTUP_CACHE_VARIABLE}={value!r} is not known (allowed: {allowed})")
    return value


def startup_cache_folder() -> Path | None:
    """Where results measured at start are kept; None where `VLLM_METAL_STARTUP_CACHE` is `off`.

    Raises:
        UserError: the variable has an unknown value.
    """
    return cache_folder() / "startup" if startup_cache() == "on" else None
