"""The tests mirror the package, file for file, and files hold one idea."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_metal"
TESTS = ROOT / "tests"

MAX_LINES = 300

MIRRORED_ELSEWHERE = {
    "__init__.py": "test_register.py",  # what it holds is `register`
}
"""Modules whose test has another name."""

WITHOUT_MODULE = {
    "test_docs.py",
    "test_import_ladder.py",
    "attention/test_several_new_tokens.py",
    "kernels/test_llvm_ir.py",
    "kernels/test_mlx_text.py",
    "kv_cache/test_memory.py",
    "metal_kernel_backend/turboquant/test_broken_tokens.py",
    "test_layout_of_tests.py",
    "test_parallel.py",
}
"""Tests about the repository rather than one module; those in `e2e` are about all of them."""


def is_empty(file: Path) -> bool:
    """Whether a file holds a docstring at most."""
    body = ast.parse(file.read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def mirror(module: Path) -> Path:
    """Where a module's test lies, relative to `tests`."""
    special = MIRRORED_ELSEWHERE.get(module.as_posix())
    return Path(special) if special else module.with_name(f"test_{module.name}")


MODULES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if not is_empty(file))
TEST_FILES = sorted(file.relative_to(TESTS) for file in TESTS.rglob("test_*.py"))
SOURCES = sorted(
    file.relative_to(ROOT)
    for folder in ("vllm_metal", "tests", "examples", "benchmarks", "packaging", "scripts")
    for file in (ROOT / folder).rglob("*.py")
)


def test_every_module_has_its_test():
    assert [module for module in MODULES if not (TESTS / mirror(module)).exists()] == []


def test_every_test_has_its_module():
    """In the package, or in a folder at the root: `examples/a.py`, `packaging/a.sh`, and
    `kernels/a.metal` for `test_a_metal.py`."""
    mirrored = {mirror(module) for module in MODULES}

    def has_module(test: Path) -> bool:
        if test in mirrored or test.as_posix() in WITHOUT_MODULE or test.parts[0] == "e2e":
            return True
        name = test.stem.removeprefix("test_")
        names = (f"{name}.py", f"{name}.sh", name.replace("_metal", ".metal"))
        files = [test.with_name(name) for name in names]
        return len(test.parts) > 1 and any((ROOT / file).is_file() for file in files)

    assert [test for test in TEST_FILES if not has_module(test)] == []


def test_exceptions_exist():
    assert all((PACKAGE / module).exists() for module in MIRRORED_ELSEWHERE)
    assert all((TESTS / test).exists() for test in WITHOUT_MODULE)


def test_every_file_is_short():
    lines = {source: len((ROOT / source).read_text().splitlines()) for source in SOURCES}
    assert {source: count for source, count in lines.items() if count > MAX_LINES} == {}
