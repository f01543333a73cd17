"""Test processes side by side: which tests stay together, and how compiled libraries are shared."""

import os

import pytest

from tests import parallel


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/a/test_b.py::test_c[d]", "tests/a/test_b.py"),
        ("tests/e2e/test_greedy_tokens.py::test_alone", "demo engines"),
        ("tests/e2e/test_agents.py::test_responses", "server"),
        ("tests/e2e/test_server.py::test_json", "server"),
        ("tests/e2e/test_turboquant.py::test_eight_bits_give[4-32]", "demo engines"),
        ("tests/e2e/test_turboquant.py::test_alone[q8_0-q3_0]", "tests/e2e/test_turboquant.py"),
        ("tests/e2e/test_models.py::test_alone[llama-dense]", "llama-dense]"),
        ("tests/e2e/test_models.py::test_chunked_prefill[llama-dense]", "llama-dense]"),
        ("tests/e2e/test_models.py::test_without_a_kind", "tests/e2e/test_models.py"),
    ],
)
def test_tests_that_share_what_is_expensive_are_a_group(test, group):
    assert parallel.group_of(test) == group


def test_the_modules_of_groups_exist():
    root = parallel.Path(__file__).parent.parent
    for name in (
        *parallel._WITH_DEMO_ENGINES,
        *parallel._WITH_THE_SERVER,
        *parallel._ENGINE_FOR_EACH_KIND,
    ):
        file, _, test = name.partition("::")
        assert f"def {test}" in (root / file).read_text()


def test_a_process_begins_with_the_libraries_of_others_and_leaves_its_own(monkeypatch, tmp_path):
    """Neither replaces a library that exists."""
    shared = tmp_path / "shared"
    libraries = shared / "mlx" / "1.0" / "cpu"
    libraries.mkdir(parents=True)
    (libraries / "libold.so").write_text("old")
    (libraries / "old.cpp").write_text("source")
    monkeypatch.setattr(parallel, "_WORKER", "gw7")
    monkeypatch.setattr(parallel, "_SHARED", shared)
    for name, value in {
        "PYTEST_XDIST_WORKER_COUNT": "2",
        "TMPDIR": "",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)

    parallel.prepare_process()
    own = parallel.Path(os.environ["TMPDIR"])
    assert own.name.startswith("gw7-")
    assert [path.name for path in own.rglob("*") if path.is_file()] == ["libold.so"]
    (own / "mlx" / "1.0" / "cpu" / "libnew.so").write_text("new")

    parallel.finish_process()
    assert {path.name: path.read_text() for path in libraries.glob("*.so")} == {
        "libold.so": "old",
        "libnew.so": "new",
    }
    assert not own.exists()


def test_a_single_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(parallel, "_WORKER", None)
    before = dict(os.environ)
    parallel.prepare_process()
    parallel.finish_process()
    assert dict(os.environ) == before
