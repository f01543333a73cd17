"""Whether what this package needs is installed, and whether it is installed once."""

import importlib.metadata
import importlib.util

REQUIRED = {"mlx": "mlx", "mlx_lm": "mlx-lm"}
"""Modules without which nothing can be served, and the distributions to install for them."""


def missing_distributions() -> list[str]:
    """The distributions of `REQUIRED` whose module cannot be found."""
    return [name for module, name in REQUIRED.items() if importlib.util.find_spec(module) is None]


def distributions_of_the_plugin() -> list[str]:
    """The installed distributions that offer the package `vllm_metal` to vLLM, as `NAME VERSION`.

    More than one overwrite each other's files. They are found by vLLM's entry point, which
    editable installations have too, and which takes a tenth of the time that
    `importlib.metadata.packages_distributions` needs to read every installed file's name.
    """
    entries = importlib.metadata.entry_points(group="vllm.platform_plugins")
    found = {
        f"{entry.dist.name} {entry.dist.version}"
        for entry in entries
        if entry.module.partition(".")[0] == "vllm_metal" and entry.dist is not None
    }
    return sorted(found)
