"""What test processes that run side by side (pytest-xdist) must not share, or share with care."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
"""Name of this process among several, e.g. gw0; None where it is the only one."""

_SHARED = Path(tempfile.gettempdir())


def prepare_process() -> None:
    """Gives this process its share of the cores, and a temporary folder of its own.

    To be called before the BLAS library is loaded, which reads the number of threads then.

    MLX compiles fused operations for the CPU with a C++ compiler, and keeps the libraries in the
    temporary folder for later processes. It takes a library that exists for one that is finished,
    so of two processes that need the same one at a time the second may load a part of it. A folder
    of its own that begins with links to the finished libraries avoids that.
    """
    if _WORKER is None:
        return
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    own = Path(tempfile.mkdtemp(prefix=f"{_WORKER}-"))  # short: vLLM's socket paths begin with it
    _link_libraries(_SHARED, own)
    os.environ["TMPDIR"] = str(own)


def finish_process() -> None:
    """Gives the libraries that MLX has compiled to later runs, and removes the own folder."""
    if _WORKER is None:
        return
    own = Path(os.environ["TMPDIR"])
    os.environ["TMPDIR"] = str(_SHARED)
    _link_libraries(own, _SHARED)
    shutil.rmtree(own, ignore_errors=True)


def group_by_module(items: list[pytest.Item]) -> None:
    """Keeps the tests of a module in one process, as they share fixtures; the slow ones go first.

    Tests with a group of their own (`xdist_group`) stay in that.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            module = item.path.relative_to(TESTS).with_suffix("").as_posix()
            item.add_marker(pytest.mark.xdist_group(module))
    if _WORKER is not None:
        items.sort(key=lambda item: item.get_closest_marker("engine") is None)


def _link_libraries(source: Path, target: Path) -> None:
    """Links MLX's compiled libraries in the temporary folder `source` into `target`."""
    for library in (source / "mlx").rglob("lib*.so"):
        link = target / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(library, link)
        except OSError:  # it exists, or lies on another disk: it is compiled again where needed
            continue
