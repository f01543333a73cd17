"""Where and when figures were measured, which stands beside all that are kept, and whether they can
be kept."""

import os
import platform
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

from vllm_metal.errors import UserError


def provenance(*packages: str) -> dict:
    """Date, machine, MLX's device, and the versions of these packages."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "mlx_device": str(mx.default_device()),
        "versions": {name: version(name) for name in packages},
    }


def check_files(output: Path | None, plot: Path | None) -> None:
    """Raises UserError where the figures could not be written when they are there."""
    for option, path in (("--output", output), ("--plot", plot)):
        if path and not path.parent.is_dir():
            raise UserError(f"{option} {str(path)!r} is in no folder that exists")
    if plot and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed (extra: eval)")
