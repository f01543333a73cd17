"""What is said of the machine that figures come from."""

import json
from datetime import date
from importlib.metadata import version

from vllm_metal.machine.provenance import provenance


def test_it_names_day_machine_device_and_versions():
    said = json.loads(json.dumps(provenance("mlx", "numpy")))
    assert date.fromisoformat(said["date"]) <= date.today()
    assert said["machine"].endswith(" cores") and said["mlx_device"].startswith("Device(")
    assert said["versions"] == {"mlx": version("mlx"), "numpy": version("numpy")}
