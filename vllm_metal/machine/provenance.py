"""Where and when figures were measured: it stands beside all that are kept."""

import os
import platform
from datetime import date
from importlib.metadata import version

import mlx.core as mx


def provenance(*packages: str) -> dict:
    """Date, machine, MLX's device, and the versions of these packages."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "mlx_device": str(mx.default_device()),
        "versions": {name: version(name) for name in packages},
    }
