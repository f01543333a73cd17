"""The one place where dense or TurboQuant is chosen, and the kernels or MLX operations for it."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.config import TurboQuantConfig
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.dense import DensePages
from vllm_metal.metal_kernel_backend.kernel_library import available_target
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantReference
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.layout import check_head_size

Calibrate = Callable[[], Sequence[KeyConstants]]
"""Gives the constants of every layer; called only where a layer is compressed."""


def make_backends(
    shapes: Sequence[LayerShape],
    block_size: int,
    dense_dtype: mx.Dtype,
    turboquant: TurboQuantConfig | None,
    calibrate: Calibrate,
) -> list[AttentionBackend]:
    """One backend for each layer.

    Raises:
        UserError: a layer that is to be compressed cannot be; gives every reason.
    """
    if turboquant is None:
        return [DensePages(shape, block_size, dense_dtype) for shape in shapes]
    skipped = turboquant.skipped(len(shapes))
    _require_compressible(shapes, skipped)
    formats = key_format(turboquant.k_quant), value_format(turboquant.v_quant)
    constants = calibrate()
    target = available_target()

    def compressed(layer: int) -> AttentionBackend:
        arguments = shapes[layer], block_size, formats, constants[layer]
        if target is None:
            return TurboQuantReference(*arguments, turboquant.reproducible)
        return TurboQuantFused(*arguments, target, turboquant.reproducible)

    return [
        DensePages(shape, block_size, dense_dtype) if layer in skipped else compressed(layer)
        for layer, shape in enumerate(shapes)
    ]


def neutral_constants(shapes: Sequence[LayerShape]) -> Calibrate:
    """Constants that change nothing, for whoever only asks for sizes."""
    return lambda: [KeyConstants.neutral(s.num_kv_heads, s.head_size) for s in shapes]


def _require_compressible(shapes: Sequence[LayerShape], skipped: frozenset[int]) -> None:
    reasons = [
        f"layer {layer}: {reason}"
        for layer, shape in enumerate(shapes)
        if layer not in skipped
        for reason in _obstacles(shape)
    ]
    if reasons:
        raise UserError("TurboQuant cannot compress this model", reasons[:4])


def _obstacles(shape: LayerShape) -> list[str]:
    """Why a layer cannot be compressed."""
    if shape.fetched and shape.num_kv_heads == 1 and shape.head_size != shape.head_size_v:
        return [
            "its cache holds a latent (MLA) or the keys of an index, whose loss by compression is "
            "not measured: serve it without TurboQuant, or name the layer in skip_layers"
        ]
    reasons = []
    for size in sorted({shape.head_size, shape.head_size_v}):
        try:
            check_head_size(size)
        except ValueError as error:
            reasons.append(str(error))
    return reasons
