"""vLLM on Apple Silicon through MLX.

vLLM finds `register` through the entry point group `vllm.platform_plugins` and calls it in every
process it starts.
"""

import importlib.util
import os

__version__ = "0.1.0"


def register() -> str | None:
    """The platform's dotted name where MLX is installed, else None.

    Sets what must hold before vLLM starts any engine process, and before MLX is imported in this
    one:

    - engine processes are spawned: a forked child hangs in its first MLX evaluation once the parent
      has evaluated anything;
    - the V1 model runner protocol is used;
    - OpenMP threads of torch and MKL sleep while they wait: spinning, they would take the cores
      from MLX's own threads;
    - MLX's CPU backend finds a fast BLAS;
    - a `UserError` that ends a process is shown without its stack;
    - vLLM counts requests whose logits are not numbers, which the worker looks for in every step.
    """
    if importlib.util.find_spec("mlx") is None:
        return None
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    from vllm_metal.errors import show_user_errors_without_stack
    from vllm_metal.machine.blas import load_fast_blas

    load_fast_blas()
    show_user_errors_without_stack()
    return "vllm_metal.platform.MetalPlatform"
