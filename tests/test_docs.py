"""The documentation names what exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FUNCTION = re.compile(r"`([\w/]+\.py) : ([\w.]+)`")
"""How documents name a function: `file : name`, the file within the package."""


def named_functions() -> list[tuple[str, str, str]]:
    """(document, file, name) wherever a document names a function."""
    return [
        (document.name, *match)
        for document in sorted(DOCS.rglob("*.md"))
        for match in FUNCTION.findall(document.read_text())
    ]


def definitions(file: Path) -> set[str]:
    """Functions, classes and methods of a file, methods as `Class.method`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{member.name}"
                for member in node.body
                if isinstance(member, ast.FunctionDef)
            }
    return found


def test_named_functions_exist():
    named = named_functions()
    assert named, "no document names a function"
    missing = [
        f"{document}: {name} in {file}"
        for document, file, name in named
        if not (path := ROOT / "vllm_metal" / file).exists() or name not in definitions(path)
    ]
    assert missing == []


def test_the_decode_step_is_told_through_its_files_in_order():
    """Each file is first met in the order in which a step passes through it."""
    files = [file for document, file, _ in named_functions() if document == "one_decode_step.md"]
    assert list(dict.fromkeys(files)) == [
        "worker.py",
        "runner/model_runner.py",
        "runner/request_batch.py",
        "runner/forward_inputs.py",
        "kv_cache/groups.py",
        "kv_cache/group_metadata.py",
        "attention/metadata.py",
        "model/decode_graphs.py",
        "model/model_binding.py",
        "model/layer_cache.py",
        "model/dry_forward.py",
        "attention/backend.py",
        "kv_cache/cache.py",
        "metal_kernel_backend/dense.py",
        "metal_kernel_backend/turboquant/fused.py",
        "metal_kernel_backend/turboquant/launcher.py",
        "metal_kernel_backend/turboquant/reference.py",
        "runner/sampler.py",
        "runner/pending_tokens.py",
    ]


def test_every_page_is_in_the_navigation():
    """mkdocs leaves out, without a word, what its navigation does not name."""
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    navigation = set(
        re.findall(r"^ +- .*?([\w/-]+\.md)$", (ROOT / "mkdocs.yaml").read_text(), re.M)
    )
    assert navigation == pages


def test_links_between_pages_lead_somewhere():
    links = [
        (page, link)
        for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    ]
    assert links, "no page links to another"
    dead = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert dead == []


def test_the_measured_table_is_the_committed_measurement():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "quality_table.py", "--check"])
    assert done.returncode == 0
