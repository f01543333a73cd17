"""The documentation names what exists."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_metal.config import parse
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.presets import PRESETS, VLLM_PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
MAX_WIDTH = 100

FUNCTION = re.compile(r"`([\w/]+\.py) : ([\w.]+)`")
"""How documents name a function: `file : name`, the file within the package, or the end of its path
where no other file has it."""


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


def package_file(name: str) -> Path | None:
    """The file of the package that a document names; None where there is none, or several."""
    package = ROOT / "vllm_metal"
    if (package / name).exists():
        return package / name
    ends = [file for file in package.rglob("*.py") if f"/{file.as_posix()}".endswith(f"/{name}")]
    return ends[0] if len(ends) == 1 else None


def test_named_functions_exist():
    named = named_functions()
    assert named, "no document names a function"
    missing = [
        f"{document}: {name} in {file}"
        for document, file, name in named
        if not (path := package_file(file)) or name not in definitions(path)
    ]
    assert missing == []


def test_the_decode_step_is_told_through_its_files_in_order():
    """Each file is first met in the order in which a step passes through it."""
    files = [file for document, file, _ in named_functions() if document == "one_decode_step.md"]
    assert list(dict.fromkeys(files)) == [
        "worker.py",
        "runner/model_runner.py",
        "runner/steps_in_flight.py",
        "runner/request_batch.py",
        "runner/segments.py",
        "runner/decode_forward.py",
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
        "kv_cache/recurrent_states.py",
        "metal_kernel_backend/paged/backend.py",
        "metal_kernel_backend/paged/launcher.py",
        "metal_kernel_backend/dense/reference.py",
        "metal_kernel_backend/turboquant/reference.py",
        "runner/sampler.py",
        "runner/dispatch.py",
        "runner/pending_tokens.py",
        "runner/acceptance.py",
        "runner/nan_logits.py",
        "scheduler.py",
        "runner/proposers.py",
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
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    ]
    assert links, "no page links to another"
    dead = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert dead == []


def test_the_measured_table_is_the_committed_measurement():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "quality_table.py", "--check"])
    assert done.returncode == 0


@pytest.mark.nightly
def test_the_tables_of_what_fits_are_those_of_the_plan():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "what_fits.py", "--check"])
    assert done.returncode == 0


def test_lines_are_no_longer_than_those_of_the_code():
    """Lines of prose and of code; a table's row and a link cannot be broken."""
    long = [
        f"{page.name}:{number}"
        for page in PAGES
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > MAX_WIDTH and not line.startswith("|")
    ]
    assert long == []


def test_the_first_pages_show_the_measurement():
    figures = json.loads(
        (ROOT / "vllm_metal/metal_kernel_backend/turboquant/measured_loss.json").read_text()
    )["runs"][0]["pairs"]
    for page in (ROOT / "README.md", DOCS / "index.md"):
        rows = re.findall(r"^\| `(\w+/\w+)` \| ([\d.]+)x \| (\S+) % \|$", page.read_text(), re.M)
        assert len(rows) == 3, page
        for pair, ratio, percent in rows:
            assert ratio == f"{figures[pair]['ratio']:.2f}"
            assert percent == f"{100 * (figures[pair]['perplexity_ratio'] - 1):+.1f}"


def test_the_reference_covers_every_module():
    """Also one that is added: a folder brings its modules, the package itself does not."""
    named = set()
    for page in (DOCS / "api").glob("*.md"):
        named |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M))
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / "vllm_metal").rglob("*.py")
    }
    folders = named - {"vllm_metal"}
    uncovered = {
        module
        for module in modules - named
        if not any(module.startswith(f"{folder}.") for folder in folders)
    }
    assert uncovered == {"vllm_metal.metal_kernel_backend"}  # its modules are named one by one
    assert named <= modules


def test_contributing_opens_with_the_folders():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [tree] = re.findall(r"\A# Contributing\n\n```text\n(.*?)```", text, re.S)
    parents: list[str] = []
    named = set()
    for line in tree.splitlines():
        indent, name = re.match(r"( *)([\w/]+)/ +\S", line).groups()
        parents[len(indent) // 2 :] = [name]
        named.add("/".join(parents))
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []
    package = {file.parent for file in (ROOT / "vllm_metal").rglob("__init__.py")}
    assert {folder.relative_to(ROOT).as_posix() for folder in package} <= named


def test_the_settings_are_those_of_the_code():
    page = (DOCS / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+)` \| (.*?) \|", page, re.M))
    with pytest.raises(UserError, match="allowed keys") as refusal:
        parse({"nonsense": 1}, "auto")
    [allowed] = re.findall(r"allowed keys: (.*)\)", str(refusal.value))
    assert set(allowed.split(", ")) <= set(rows)
    assert re.findall(r"`(\w+)`", rows["k_quant"]) == list(KEY_FORMATS)
    assert re.findall(r"`(\w+)`", rows["v_quant"]) == list(VALUE_FORMATS)


def test_the_presets_are_those_of_the_code():
    page = " ".join((DOCS / "turboquant.md").read_text().split())
    named = dict(re.findall(r"`(turboquant_\w+)` means `(\w+/\w+)`", page))
    assert named == {preset: str(pair) for preset, pair in VLLM_PRESETS.items()}
    settings = (DOCS / "configuration.md").read_text()
    [row] = re.findall(r"^\| `preset` \| (.*?) \|", settings, re.M)
    assert re.findall(r"`([\w.]+)`", row) == list(PRESETS)
