"""Who may import whom: the ladder of the package's folders, read off the syntax trees."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vllm_metal"

LADDER = [
    ["errors"],
    ["machine", "options"],
    ["attention"],
    ["kv_cache", "metal_kernel_backend"],
    ["config", "kv_store", "model"],
    ["model_pages"],
    ["runner", "startup"],
    ["benchmark", "commands", "evaluation"],
    ["cli", "metrics", "platform", "scheduler", "worker"],
    ["__init__"],
]
"""Rungs from the ground up. A module imports from its own folder and from rungs below; what stands
on one rung does not import each other."""

WITHOUT_VLLM = [
    "machine",
    "attention",
    "metal_kernel_backend",
    "evaluation",
    "kv_cache.cache",
    "kv_cache.planner",
    "kv_cache.workspace",
    "model.model_loader",
    "model.model_binding",
]
"""What is used and tested without vLLM."""

ONLY = [
    # (what is imported, the modules or packages that may)
    ("mlx_lm", ["benchmark", "model"]),
    ("vllm.platforms", ["platform"]),
    ("vllm.v1.core.sched", ["runner", "scheduler", "worker"]),
    ("vllm.v1.kv_cache_interface", ["kv_cache.spec", "model_pages", "worker"]),
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


def rung(module: str) -> int:
    """Where a module of the package stands on the ladder."""
    [found] = [i for i, names in enumerate(LADDER) if module.split(".")[0] in names]
    return found


def test_every_folder_and_root_module_stands_on_one_rung():
    top = {module.split(".")[0] for module in modules()}
    assert sorted(top) == sorted(name for names in LADDER for name in names)


def test_imports_go_down_the_ladder():
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in imported(tree(module))
        if within(name, PACKAGE) and name != PACKAGE
        for target in [name.removeprefix(f"{PACKAGE}.")]
        if target.split(".")[0] != module.split(".")[0]
        and not (target.split(".")[0] == "__version__" or rung(target) < rung(module))
    ]
    assert wrong == []


@pytest.mark.parametrize("importer", WITHOUT_VLLM)
def test_what_needs_no_vllm_imports_none(importer):
    assert any(within(module, importer) for module in modules())
    assert {m for m in importers("vllm") if within(m, importer)} == set()


@pytest.mark.parametrize(("target", "allowed"), ONLY)
def test_doors_with_few_keys(target, allowed):
    found = importers(target)
    assert {m for m in found if not any(within(m, package) for package in allowed)} == set()


@pytest.mark.parametrize("name", KERNEL_SIDE)
def test_the_kernel_side_needs_mlx_and_numpy_only(name):
    module = f"metal_kernel_backend.turboquant.{name}"
    own = {n for n in imported(tree(module)) if within(n, PACKAGE) or within(n, "vllm")}
    assert {n for n in own if not within(n, f"{PACKAGE}.metal_kernel_backend")} == set()


@pytest.mark.parametrize(
    "module",
    ["evaluation.arguments", "model.model_loader", "machine.device", "commands.doctor"],
)
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
