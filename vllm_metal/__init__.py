"""vLLM on Apple Silicon through MLX.

vLLM finds `register` through the entry point group `vllm.platform_plugins` and calls it in every
process it starts.
"""

import logging
import multiprocessing
import os
from functools import cache

__version__ = "0.1.0"

_logger = logging.getLogger("vllm.metal")


def register() -> str | None:
    """The platform's dotted name where this package can serve, else None.

    vLLM takes another platform for None. It does so for an exception too, which it logs at its
    debug level only, so nothing is raised: what failed is logged here, as an error.

    Sets what must hold before vLLM starts any engine process, and before MLX is imported in this
    one:

    - engine processes are spawned: a forked child hangs in its first MLX evaluation once the parent
      has evaluated anything;
    - the V1 model runner protocol is used;
    - OpenMP threads of torch and MKL sleep while they wait: spinning, they would take the cores
      from MLX's own threads;
    - MLX's CPU backend finds a fast BLAS;
    - MLX's Metal backend puts more operations into a command buffer, on Macs before M5;
    - a `UserError` that ends a process is shown without its stack;
    - vLLM's warning about custom schedulers is left out for this package's own;
    - vLLM counts requests whose logits are not finite; the worker checks them in every step.
    """
    try:
        return _register()
    except Exception:
        _logger.exception("vllm_metal failed, so vLLM runs on another platform")
        return None


def _register() -> str | None:
    from vllm_metal.errors import show_user_errors_without_stack
    from vllm_metal.machine.blas import load_fast_blas
    from vllm_metal.machine.command_buffers import raise_operations_per_buffer
    from vllm_metal.machine.installation import missing_distributions
    from vllm_metal.options.scheduler_class import hide_warning_about_own_scheduler

    in_main_process = multiprocessing.parent_process() is None
    if missing := missing_distributions():
        if in_main_process:
            _logger.warning(
                "vllm_metal needs %s, which cannot be found, so vLLM runs on another platform "
                "(pip install %s)",
                " and ".join(missing),
                " ".join(missing),
            )
        return None
    if in_main_process:
        _warn_of_other_distributions()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    raise_operations_per_buffer()
    load_fast_blas()
    show_user_errors_without_stack()
    hide_warning_about_own_scheduler()
    import vllm_metal.platform  # noqa: F401  what fails in it is logged like all else

    return "vllm_metal.platform.MetalPlatform"


@cache
def _warn_of_other_distributions() -> None:
    """Warns once, though vLLM calls `register` twice."""
    from vllm_metal.machine.installation import distributions_of_the_plugin

    found = distributions_of_the_plugin()
    if len(found) > 1:
        names = [name.split()[0] for name in found]
        _logger.warning(
            "The package vllm_metal is installed by %s, which overwrite each other's files: "
            "pip uninstall %s, then install the one that you want",
            " and by ".join(found),
            " ".join(names),
        )
