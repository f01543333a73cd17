"""What is missing, and which distributions claim the package."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from vllm_metal.machine import installation


def install(folder: Path, name: str, target: str = "vllm_metal:register") -> None:
    """A distribution that offers vLLM a platform, as pip leaves it in a folder of packages."""
    info = folder / f"{name.replace('-', '_')}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nmetal = {target}\n")


def test_nothing_is_missing_here():
    assert installation.missing_distributions() == []


@pytest.mark.parametrize(("module", "distribution"), installation.REQUIRED.items())
def test_a_module_that_cannot_be_found(monkeypatch, module, distribution):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else found(name)
    )
    assert installation.missing_distributions() == [distribution]


def test_distributions_that_offer_this_package(tmp_path, monkeypatch):
    own = installation.distributions_of_the_plugin()
    install(tmp_path, "another-plugin")
    install(tmp_path, "another-platform", "vllm_tpu:register")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(installation.distributions_of_the_plugin()) == {"another-plugin 2.0", *own}
