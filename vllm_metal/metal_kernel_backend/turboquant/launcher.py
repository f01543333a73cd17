"""The launcher of the TurboQuant kernels, and what it is told of a layer."""

from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.metal_kernel_backend.paged import kernels as paged
from vllm_metal.metal_kernel_backend.paged.launcher import PageLauncher
from vllm_metal.metal_kernel_backend.turboquant.kernels import KERNELS, codebook
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


@dataclass(frozen=True)
class LayerConstants(paged.LayerConstants):
    """What the kernels are told of one layer, beside its layout. All float32."""

    centre: mx.array
    """[H, Dk], `KeyCodec.centre`."""
    key_factors: mx.array
    """[H, Dk], `KeyCodec.key_factors`."""
    query_factors: mx.array
    """[H, Dk], `KeyCodec.query_factors`."""
    value_factors: mx.array
    """[Dv], `ValueCodec.factors`."""


@dataclass
class Launcher(PageLauncher[PageLayout]):
    """The TurboQuant kernels of one layout on one target."""

    kernels = KERNELS

    def layout_inputs(self) -> dict[str, mx.array]:
        layout = self.layout
        return {
            "key_codebook": codebook(layout.key_format, layout.key_head_size),
            "value_codebook": codebook(layout.value_format, layout.value_head_size),
        }
