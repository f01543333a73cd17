"""The one place where dense or TurboQuant is chosen, and the kernels or MLX operations for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.page_sizes import TOKEN_STEP, PageSize, TokenBytes, page_sizes
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.dense import DensePages
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantReference
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout, check_head_size

Calibrate = Callable[[], Sequence[KeyConstants]]
"""Gives the constants of every layer; called only where a layer is compressed."""


def make_backends(
    shapes: Sequence[LayerShape],
    block_size: int,
    dense_dtype: mx.Dtype,
    turboquant: TurboQuantConfig | None,
    calibrate: Calibrate,
    states: Sequence[StateShape] = (),
) -> list[AttentionBackend]:
    """One backend for each layer.

    Args:
        shapes: of the layers.
        block_size: tokens of a block; more where layers of different kinds share pages.
        dense_dtype: element type of dense pages.
        turboquant: formats, and the layers to leave dense; None: all dense.
        calibrate: asked for the constants where a layer is compressed.
        states: recurrent states that share pages with the layers.

    Raises:
        UserError: a layer that is to be compressed cannot be; gives every reason.
    """
    dense = frozenset(range(len(shapes)))
    if turboquant is not None:
        dense = turboquant.skipped(len(shapes))
        _require_compressible(shapes, dense)
    slot_sizes = [
        (shape.head_size + shape.head_size_v) * dense_dtype.size
        if layer in dense
        else _compressed_slot_size(shape, turboquant)
        for layer, shape in enumerate(shapes)
    ]
    layers = [
        TokenBytes(shape.num_kv_heads * slot_size, shape.sliding_window)
        for shape, slot_size in zip(shapes, slot_sizes, strict=True)
    ]
    pages = page_sizes(layers, [state.page_bytes for state in states], block_size)
    page_kinds = {
        (replace(shape, sliding_window=None), layer in dense) for layer, shape in enumerate(shapes)
    }
    shared = bool(states) or len(page_kinds) > 1
    constants = calibrate() if len(dense) < len(shapes) else []
    target = available_target()
    return [
        DensePages(shape, page.block_size, dense_dtype, page.page_bytes, shared)
        if layer in dense
        else _compressed(shape, page, turboquant, constants[layer], target)
        for layer, (shape, page) in enumerate(zip(shapes, pages, strict=True))
    ]


def _compressed_slot_size(shape: LayerShape, turboquant: TurboQuantConfig) -> int:
    return PageLayout(
        *turboquant.formats, shape.head_size, shape.head_size_v, 1, TOKEN_STEP
    ).slot_size


def _compressed(
    shape: LayerShape,
    page: PageSize,
    turboquant: TurboQuantConfig,
    constants: KeyConstants,
    target: Target | None,
) -> AttentionBackend:
    formats = turboquant.formats
    if target is None:
        return TurboQuantReference(
            shape, page.block_size, formats, constants, turboquant.reproducible, page.page_bytes
        )
    return TurboQuantFused(
        shape, page.block_size, formats, constants, target, turboquant.reproducible, page.page_bytes
    )


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
    if not reasons and len(skipped) == len(shapes):
        reasons = ["all its layers are in skip_layers" if shapes else "it has no keys and values"]
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
