"""TurboQuant pages behind the attention boundary, on the kernels."""

from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.paged.backend import KernelAttention
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


@cache
def shared_launcher(layout: PageLayout, target: Target) -> Launcher:
    """One launcher for all layers of a layout."""
    return Launcher(layout, target)


class TurboQuantFused(KernelAttention, TurboQuantAttention):
    """The kernels of `target`."""

    launcher: Launcher
    plain_dtype = mx.float32

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: FormatPair,
        constants: KeyConstants,
        target: Target,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size, formats, constants, reproducible, page_bytes)
        self.launcher = shared_launcher(self.layout, target)
        self.name += f" ({target.name} kernels)"
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
