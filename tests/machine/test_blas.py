"""The BLAS that serves MLX. Each case runs in a process of its own: libraries stay loaded."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest

from vllm_metal.machine import blas

linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="macOS has Accelerate")

BINDING = re.compile(
    r"binding file \S*mlx\S* \[\d+\] to (\S+) \[\d+\]: normal symbol `(?:cblas_sgemm|sgemm_)'"
)
"""A line of the dynamic linker's trace: MLX, or its BLAS, finds a product in a library."""

PRODUCT = """
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
a = rng.standard_normal((64, 96), dtype=np.float32)
b = rng.standard_normal((96, 80), dtype=np.float32)
c = np.array(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu))
np.testing.assert_allclose(c, a @ b, atol=1e-4)
"""


def run(code: str, **environment: str) -> str:
    """Standard output of `code` in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@linux_only
def test_the_product_is_computed_by_the_loaded_library(tmp_path):
    """The dynamic linker's own record says which library MLX's product is bound to."""
    trace = tmp_path / "bindings"
    code = "from vllm_metal.machine.blas import load_fast_blas\nprint(load_fast_blas())\n" + PRODUCT
    serves = run(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(trace)).strip()
    library = re.search(r"\((lib\w+)", serves).group(1)

    bound_to = set()
    for file in tmp_path.iterdir():
        with file.open(errors="replace") as lines:
            for match in filter(None, map(BINDING.search, lines)):
                bound_to.add(match[1].rpartition("/")[2])
    assert any(name.startswith(library) for name in bound_to), (serves, bound_to)


@linux_only
def test_torch_serves_where_openblas_is_absent():
    code = (
        "import sys\n"
        "from vllm_metal.machine import blas\n"
        "blas.OPENBLAS = 'libno-such-blas.so'\n"
        "print(blas.load_fast_blas())\n"
        "assert 'torch' not in sys.modules and 'mlx.core' not in sys.modules\n"
    )
    assert run(code + PRODUCT + "import torch\ntorch.ones(2) @ torch.ones(2)\n").startswith(
        "PyTorch's BLAS"
    )


@linux_only
def test_too_late_is_said():
    code = (
        "import mlx.core\n"
        "from vllm_metal.machine.blas import load_fast_blas\n"
        "print(load_fast_blas())"
    )
    assert "mlx.core was imported before" in run(code)


def test_nothing_is_loaded_on_macos(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(blas.ctypes, "CDLL", None)
    assert blas.load_fast_blas.__wrapped__() == "MLX's own BLAS"


def test_without_any_library(monkeypatch):
    """A machine whose torch has no BLAS to lend keeps MLX's own."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(blas, "OPENBLAS", "libno-such-blas.so")
    monkeypatch.setattr(blas, "find_spec", lambda name: None)
    assert "no faster one" in blas.load_fast_blas.__wrapped__()
