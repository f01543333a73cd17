"""What test processes that run side by side (pytest-xdist) must not share, or share with care."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

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
    own = Path(
        tempfile.mkdtemp(prefix=f"{_WORKER}-", dir=_SHARED)
    )  # short: vLLM's socket paths begin with it
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


def slow_ones_first(items: list[pytest.Item]) -> None:
    """The order in which processes side by side take tests, so that they end at about one time.

    A single process keeps the order in which tests are written.
    """
    if _WORKER is not None:
        items.sort(key=lambda item: item.get_closest_marker("engine") is None)


def make_scheduler(config: pytest.Config, log: object) -> object:
    """pytest-xdist's scheduler that keeps groups of tests together, with the groups of `group_of`.

    Groups are given out in the order of the tests. (`--dist loadgroup` knows groups by a mark that
    it adds to a test's id, which pytest 9.2 does not let it do.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process, because they share what is expensive to make.

    That is a module by default; across modules the engines of the demo model and the server, and
    within the tests of all kinds of models the engine of each kind.
    """
    module, _, test = nodeid.partition("::")
    if any(nodeid.startswith(prefix) for prefix in _WITH_DEMO_ENGINES):
        return "demo engines"
    if module in _WITH_THE_SERVER:
        return "server"
    if module in _ENGINE_FOR_EACH_KIND:
        return test.partition("[")[2] or module
    return module


_WITH_DEMO_ENGINES = (
    "tests/e2e/test_greedy_tokens.py",
    "tests/e2e/test_turboquant.py::test_eight_bits",
)
_WITH_THE_SERVER = ("tests/e2e/test_agents.py", "tests/e2e/test_server.py")
_ENGINE_FOR_EACH_KIND = ("tests/e2e/test_models.py", "tests/e2e/test_soak.py")


def _link_libraries(source: Path, target: Path) -> None:
    """Links MLX's compiled libraries in the temporary folder `source` into `target`."""
    for library in (source / "mlx").rglob("lib*.so"):
        link = target / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(library, link)
        except OSError:  # it exists, or lies on another disk: it is compiled again where needed
            continue
