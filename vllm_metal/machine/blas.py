"""A fast BLAS for MLX's CPU backend on Linux, without a dependency.

MLX's Linux wheel carries the reference BLAS. Its `cblas_sgemm`, and that library's own call of
`sgemm_`, are bound by the dynamic linker when they are first used, and libraries that are in the
process's global scope come first. So a faster library that is loaded globally before `mlx.core`
takes the place of the reference one:

    OpenBLAS, if the system has it           cblas_sgemm and sgemm_
    PyTorch's libtorch_cpu.so otherwise      sgemm_ (MKL's on x86-64); always here, vLLM needs it

macOS has Accelerate, and nothing is done there. GPU backends are not affected.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

OPENBLAS = "libopenblas.so.0"


@functools.cache
def load_fast_blas() -> str:
    """Loads the fastest BLAS at hand for MLX; the answer names what serves, for a log line.

    To be called before `mlx.core` is first imported: afterwards it changes nothing and says so.
    Further calls give the first answer. Never raises: without a faster library MLX's own serves.
    """
    if platform.system() != "Linux":
        return "MLX's own BLAS"
    if "mlx.core" in sys.modules:
        return "MLX's own BLAS (mlx.core was imported before a faster one could be loaded)"
    return load_openblas() or load_torch_blas() or "MLX's own BLAS (no faster one was found)"


def load_openblas() -> str | None:
    """Loads the system's OpenBLAS globally; None if there is none."""
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return f"OpenBLAS ({OPENBLAS})"


def load_torch_blas() -> str | None:
    """Loads PyTorch's CPU library globally without importing torch; None if it has no `sgemm_`."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    try:
        if not hasattr(ctypes.CDLL(str(folder / "libtorch_cpu.so")), "sgemm_"):
            return None
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return "PyTorch's BLAS (libtorch_cpu.so)"
