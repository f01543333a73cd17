"""Where files are kept that are made once: the demo model, and kernels compiled for the CPU."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vllm_metal`, or `~/.cache/vllm_metal`; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm_metal"
