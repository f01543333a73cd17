"""The one place where dense or TurboQuant is chosen, and the kernels or MLX operations for it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, LayerShape
from vllm_metal.attention.page_sizes import PageSize, StateCaching, TokenBytes, page_sizes
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused, obstacle
from vllm_metal.metal_kernel_backend.dense.layout import dense_slot_size
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.kernel_library import Target, available_target
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.layout import check_head_size
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

logger = logging.getLogger("vllm.metal.cache")

Calibrate = Callable[[], Sequence[KeyConstants]]
"""Gives the constants of every layer; called only where a layer is compressed."""


def make_backends(
    shapes: Sequence[LayerShape],
    block_size: int,
    dense_dtype: mx.Dtype,
    turboquant: TurboQuantConfig | None,
    calibrate: Calibrate,
    states: Sequence[StateShape] = (),
    caching: StateCaching | None = None,
) -> list[AttentionBackend]:
    """One backend for each layer.

    Args:
        shapes: of the layers.
        block_size: tokens of a block; more where layers of different kinds share pages.
        dense_dtype: element type of dense pages.
        turboquant: formats, and the layers to leave dense; None: all dense.
        calibrate: asked for the constants where a layer is compressed.
        states: recurrent states that share pages with the layers.
        caching: how prefixes are cached beside states; None where they are not.

    Raises:
        UserError: a layer that is to be compressed cannot be; gives every reason.
    """
    formats = _formats_of_layers(shapes, turboquant)
    layers = [
        TokenBytes(shape.num_kv_heads * _slot_size(shape, pair, dense_dtype), shape.sliding_window)
        for shape, pair in zip(shapes, formats, strict=True)
    ]
    pages = page_sizes(layers, [state.page_bytes for state in states], block_size, caching)
    kinds = {
        (replace(shape, sliding_window=None), pair)
        for shape, pair in zip(shapes, formats, strict=True)
    }
    shared = bool(states) or len(kinds) > 1
    constants = calibrate() if any(formats) else []
    target = available_target()
    make_dense = _dense_kind(target, dense_dtype, shared)
    reproducible = turboquant is not None and turboquant.reproducible
    make_compressed = _compressed_kind(target, reproducible)
    return [
        make_dense(shape, page)
        if pair is None
        else make_compressed(shape, page, pair, constants[layer])
        for layer, (shape, page, pair) in enumerate(zip(shapes, pages, formats, strict=True))
    ]


def _formats_of_layers(
    shapes: Sequence[LayerShape], turboquant: TurboQuantConfig | None
) -> list[FormatPair | None]:
    """The formats of every layer; None where its pages are dense."""
    if turboquant is None:
        return [None] * len(shapes)
    dense = turboquant.skipped(len(shapes))
    _require_compressible(shapes, dense)
    return [None if layer in dense else turboquant.formats for layer in range(len(shapes))]


def _slot_size(shape: LayerShape, formats: FormatPair | None, dense_dtype: mx.Dtype) -> int:
    """Bytes of one KV head of one token, as the layer's kind of pages has them."""
    if formats is None:
        return dense_slot_size(shape, dense_dtype)
    return formats.slot_size(shape.head_size, shape.head_size_v)


_MakeDense = Callable[[LayerShape, PageSize], AttentionBackend]


def _dense_kind(target: Target | None, dtype: mx.Dtype, shared: bool) -> _MakeDense:
    """Dense pages on the kernels, or on MLX operations where there are none or they cannot."""

    def make(shape: LayerShape, page: PageSize) -> AttentionBackend:
        size = page.block_size
        if target is None:
            return DensePages(shape, size, dtype, page.page_bytes, shared)
        if reason := obstacle(shape, size):
            if not shape.fetched:  # what a model fetches is gathered in any case
                _say_why_not(reason)
            return DensePages(shape, size, dtype, page.page_bytes, shared)
        return DenseFused(shape, size, dtype, target, page.page_bytes)

    return make


@cache
def _say_why_not(reason: str) -> None:
    """Once for all layers of a kind."""
    logger.warning(
        "A dense layer decodes on MLX operations and not on the kernels: %s. Each of its decode "
        "steps copies the context of every request, which takes several times as long.",
        reason,
    )


_MakeCompressed = Callable[[LayerShape, PageSize, FormatPair, KeyConstants], AttentionBackend]


def _compressed_kind(target: Target | None, reproducible: bool) -> _MakeCompressed:
    """Compressed pages on the kernels, or on MLX operations where there are none."""

    def make(
        shape: LayerShape, page: PageSize, formats: FormatPair, constants: KeyConstants
    ) -> AttentionBackend:
        size = page.block_size
        if target is None:
            return TurboQuantReference(
                shape, size, formats, constants, reproducible, page.page_bytes
            )
        return TurboQuantFused(
            shape, size, formats, constants, target, reproducible, page.page_bytes
        )

    return make


def neutral_constants(shapes: Sequence[LayerShape]) -> Calibrate:
    """Constants that change nothing, for callers that only ask for sizes."""
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
