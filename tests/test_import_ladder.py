"""Who may import whom: the rungs of the package, read off the syntax trees.

worker, platform, command line  >  model_runner  >  metal_kernel_backend  >  attention, kv_cache
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vllm_metal"

FORBIDDEN = [
    # (importing module or package, what it must not import)
    ("attention", f"{PACKAGE}.metal_kernel_backend"),
    ("attention", "vllm"),
    ("kv_cache", f"{PACKAGE}.metal_kernel_backend"),
    ("kv_cache.cache", "vllm"),
    ("kv_cache.planner", "vllm"),
    ("kv_cache.workspace", "vllm"),
    ("metal_kernel_backend", f"{PACKAGE}.kv_cache"),
    ("metal_kernel_backend", "vllm"),
    ("metal_kernel_backend", "mlx_lm"),
    ("evaluation", "vllm"),
    ("model_loader", "vllm"),
    ("input_batch", f"{PACKAGE}.model_runner"),
    ("model_loader", f"{PACKAGE}.attention"),
    ("sampler", f"{PACKAGE}.attention"),
]

ONLY = [
    # (what is imported, the modules or packages that may)
    (f"{PACKAGE}.worker", []),
    (f"{PACKAGE}.platform", []),
    (f"{PACKAGE}.cli", []),
    (f"{PACKAGE}.evaluation", ["cli", "evaluation"]),
    (f"{PACKAGE}.model_runner", ["worker"]),
    (f"{PACKAGE}.workspace_probe", ["worker"]),
    (f"{PACKAGE}.model_cache", ["worker", "metrics", "plan"]),
    (f"{PACKAGE}.request_batch", ["model_runner"]),
    (f"{PACKAGE}.input_batch", ["model_runner"]),
    (
        "mlx_lm",
        [
            "attention.layer_kinds",
            "attention.layer_state",
            "attention.model_binding",
            "model_loader",
        ],
    ),
    ("vllm.platforms", ["platform"]),
    ("vllm.v1.core.sched", ["model_runner", "request_batch", "worker"]),
    ("vllm.v1.kv_cache_interface", ["kv_cache.spec", "model_cache", "worker"]),
]

KERNEL_SIDE = [
    "bitpack",
    "codec",
    "formats",
    "launcher",
    "layout",
    "quantizer",
    "rotation",
    "slots",
]
"""Modules of `turboquant` that are tested and measured without vLLM and without the boundary."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name within the package, by file."""
    folder = ROOT / PACKAGE
    files = sorted(folder.rglob("*.py"))
    return {".".join(f.relative_to(folder).with_suffix("").parts): f for f in files}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def imported(node: ast.AST, at_import_time: bool = False) -> Iterator[str]:
    """Full names of what is imported below `node`; only what runs on import if so asked."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        if at_import_time and (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        ):
            continue
        yield from imported(child, at_import_time)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importers(target: str) -> set[str]:
    """Modules that import `target` or something in it, anywhere in their code."""
    return {m for m in modules() if any(within(name, target) for name in imported(tree(m)))}


def own_modules(module: str) -> set[str]:
    """Modules of the package that are loaded when `module` is imported, itself included."""
    loaded, new = set(), {module}
    while new:
        loaded |= new
        names = {n for m in new for n in imported(tree(m), True) if within(n, PACKAGE)}
        found = {m for m in modules() for n in names if within(n, f"{PACKAGE}.{m}")}
        new = found - loaded
    return loaded


@pytest.mark.parametrize(("importer", "target"), FORBIDDEN)
def test_forbidden_rungs(importer, target):
    assert any(within(module, importer) for module in modules())
    assert {m for m in importers(target) if within(m, importer)} == set()


@pytest.mark.parametrize(("target", "allowed"), ONLY)
def test_doors_with_few_keys(target, allowed):
    found = importers(target)
    assert {m for m in found if not any(within(m, package) for package in allowed)} == set()


@pytest.mark.parametrize("name", KERNEL_SIDE)
def test_the_kernel_side_needs_mlx_and_numpy_only(name):
    module = f"metal_kernel_backend.turboquant.{name}"
    own = {n for n in imported(tree(module)) if within(n, PACKAGE) or within(n, "vllm")}
    assert {n for n in own if not within(n, f"{PACKAGE}.metal_kernel_backend")} == set()


@pytest.mark.parametrize("module", ["evaluation.arguments", "model_loader", "device", "doctor"])
def test_formats_are_checked_and_measured_without_vllm(module):
    loaded = own_modules(module)
    assert {m for m in loaded for n in imported(tree(m), True) if within(n, "vllm")} == set()


@pytest.mark.parametrize("module", ["__init__", "platform", "cli"])
def test_no_mlx_before_it_is_needed(module):
    """vLLM imports the platform in every process, before a fast BLAS is loaded and before forks."""
    loaded = own_modules(module)
    assert {m for m in loaded for n in imported(tree(m), True) if within(n, "mlx")} == set()


def test_no_module_imports_itself_in_a_circle():
    graph = {
        m: {
            other
            for other in modules()
            for name in imported(tree(m), at_import_time=True)
            if within(name, f"{PACKAGE}.{other}")
        }
        for m in modules()
    }
    while free := [m for m, needs in graph.items() if not needs]:
        graph = {m: needs - set(free) for m, needs in graph.items() if m not in free}
    assert graph == {}
