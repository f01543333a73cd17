"""What is said of the machine that figures come from."""

import json
import sys
from datetime import date
from importlib.metadata import version

import pytest

from vllm_metal.errors import UserError
from vllm_metal.machine.provenance import check_files, provenance


def test_it_names_day_machine_device_and_versions():
    said = json.loads(json.dumps(provenance("mlx", "numpy")))
    assert date.fromisoformat(said["date"]) <= date.today()
    assert said["machine"].endswith(" cores") and said["mlx_device"].startswith("Device(")
    assert said["versions"] == {"mlx": version("mlx"), "numpy": version("numpy")}


def test_figures_that_could_not_be_written(tmp_path, monkeypatch):
    there, nowhere = tmp_path / "figures", tmp_path / "missing" / "figures"
    check_files(None, None)
    check_files(there, there)
    with pytest.raises(UserError, match="--output .*missing/figures' is in no folder that exists"):
        check_files(nowhere, None)
    with pytest.raises(UserError, match="--plot .*missing/figures' is in no folder that exists"):
        check_files(None, nowhere)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vllm_metal.machine.provenance.find_spec", lambda name: None)
    check_files(there, None)
    with pytest.raises(UserError, match="--plot needs matplotlib"):
        check_files(None, there)
