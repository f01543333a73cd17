"""TurboQuant on MLX operations attends to what the codec reads back, however a prompt is cut."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.attention.paged_layer import PagedLayer, Request
from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    VALUE_FORMATS,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

HEADS, GROUP, SIZE, BLOCK, LENGTH, CONTEXT = 2, 3, 64, 16, 41, 23
SHAPE = LayerShape(HEADS, SIZE, SIZE)


def centre_and_multiplier() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    centre, logarithm = rng.standard_normal((2, HEADS, SIZE)).astype(np.float32)
    return 2 * centre, np.exp(0.5 * logarithm)


def stored(pair: str, reproducible: bool = False, sinks: bool = False) -> tuple:
    """A layer, one request in it with keys around the layer's centre, and what the codec reads
    back of its keys and values, [H, T, D] each. Nothing is stored yet."""
    centre, multiplier = centre_and_multiplier()
    constants = KeyConstants(centre, multiplier)
    backend = TurboQuantReference(SHAPE, BLOCK, parse_pair(pair), constants, reproducible)
    layer = PagedLayer(backend)
    request = layer.request(LENGTH, HEADS * GROUP, sinks)
    request = replace(request, keys=request.keys + centre[:, None])
    keys, values = (mx.array(part).swapaxes(0, 1) for part in (request.keys, request.values))
    keys = backend.key_codec.dequantize(backend.key_codec.quantize(keys))
    values = backend.value_codec.dequantize(backend.value_codec.quantize(values))
    return layer, request, *(np.array(part.swapaxes(0, 1)) for part in (keys, values))


def attend(request: Request, start: int, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The oracle's attention of the request from token `start` on over other keys and values."""
    queries = request.queries[:, start:]
    return reference.attention(queries, keys, values, request.scale, request.sinks)


def close(actual: mx.array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(actual), expected, atol=2e-4)


@pytest.mark.parametrize("k_quant", KEY_FORMATS)
def test_decode_attends_to_what_the_codec_reads_back(k_quant):
    for v_quant in VALUE_FORMATS:
        layer, request, keys, values = stored(f"{k_quant}/{v_quant}")
        layer.prefill(request, 0, LENGTH - 1)
        close(layer.decode([request])[0], attend(request, LENGTH - 1, keys, values)[:, 0])


@pytest.mark.parametrize("k_quant", ["q8_0", "q4_0", "uint4"])
def test_a_later_chunk_reads_its_context_compressed_and_itself_exactly(k_quant):
    layer, request, keys, values = stored(f"{k_quant}/q3_0")
    layer.prefill(request, 0, CONTEXT)
    out = layer.prefill(request, CONTEXT, LENGTH)
    keys[:, CONTEXT:] = request.keys[:, CONTEXT:]
    values[:, CONTEXT:] = request.values[:, CONTEXT:]
    close(out, attend(request, CONTEXT, keys, values))


def test_reproducible_reads_everything_compressed_however_it_is_cut():
    layer, request, keys, values = stored("q4_0/q3_0", reproducible=True)
    for start in (0, CONTEXT):
        out = layer.prefill(request, start, LENGTH)
        close(out, attend(request, start, keys, values))


def test_sinks_see_logits_with_the_centre():
    """In a decode step, and in a chunk over a context."""
    layer, request, keys, values = stored("q8_0/q8_0", sinks=True)
    request = replace(request, sinks=3 * request.sinks)
    layer.prefill(request, 0, LENGTH - 1)
    close(layer.decode([request])[0], attend(request, LENGTH - 1, keys, values)[:, 0])
    out = layer.prefill(request, CONTEXT, LENGTH)
    keys[:, CONTEXT:] = request.keys[:, CONTEXT:]
    values[:, CONTEXT:] = request.values[:, CONTEXT:]
    close(out, attend(request, CONTEXT, keys, values))


def test_tokens_stored_singly_give_the_same_bytes():
    together, request, *_ = stored("q5_0/q3_0")
    together.prefill(request, 0, LENGTH)
    singly, request, *_ = stored("q5_0/q3_0")
    for token in range(LENGTH):
        singly.prefill(request, token, token + 1)
    assert together.pages.array.any().item()
    assert mx.array_equal(singly.pages.array, together.pages.array)
