"""vLLM on Apple Silicon through MLX.

vLLM finds `register` through the entry point group `vllm.platform_plugins` and calls it in every
process it starts.
"""

import importlib.util
import os

__version__ = "0.1.0"


def register() -> str | None:
    """The platform's dotted name where MLX is installed, else None.

    Sets what must hold before vLLM starts any engine process: engine processes are spawned,
    since a forked child hangs in its first MLX evaluation once the parent has evaluated anything,
    and the V1 model runner protocol is used.
    """
    if importlib.util.find_spec("mlx") is None:
        return None
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from vllm_metal.errors import show_user_errors_without_stack

    show_user_errors_without_stack()
    return "vllm_metal.platform.MetalPlatform"
