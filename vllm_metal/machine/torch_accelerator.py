"""torch's accelerator, which stays unused: torch computes on the CPU here."""

import torch

from vllm_metal.errors import ChangedLibraryError


def disable_cache_release() -> None:
    """Replaces two functions of torch, which vLLM calls at its shutdown, with ones that do nothing.

    torch stays on the CPU here. Emptying the caches of its accelerator fails where it has none, and
    on Apple's accelerator it crashes the process with torch 2.13.

    Raises:
        ChangedLibraryError: torch has no such functions.
    """
    # patch: torch's functions that empty the caches of its accelerator
    for name in ("empty_cache", "empty_host_cache"):
        if not hasattr(torch.accelerator, name):
            raise ChangedLibraryError("torch", f"torch.accelerator.{name}", "it does not exist")
        setattr(torch.accelerator, name, _release_nothing)


def _release_nothing() -> None:
    """Takes the place of torch's functions."""
