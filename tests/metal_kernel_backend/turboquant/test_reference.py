"""TurboQuant on MLX operations attends to what the codec reads back, however a prompt is cut."""

import mlx.core as mx
import numpy as np
import pytest

from tests.pages import empty_pages
from vllm_metal.attention.backend import Chunk, LayerShape, Rows
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.metal_kernel_backend.causal_attention import causal_attention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    VALUE_FORMATS,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

H, G, D, BLOCK, T, CONTEXT = 2, 3, 64, 16, 41, 23
SHAPE = LayerShape(H, D, D)
TABLE = mx.array([[3, 1, 5]])
SLOTS = mx.array([TABLE[0, t // BLOCK].item() * BLOCK + t % BLOCK for t in range(T)])
SCALE = D**-0.5


def normal(*shape, seed):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


KEYS = normal(T, H, D, seed=1) + 2 * normal(H, D, seed=2)
VALUES = normal(T, H, D, seed=3)
QUERIES = normal(H * G, T, D, seed=4)


def backend(k_quant, v_quant, reproducible=False):
    constants = KeyConstants(
        2 * np.array(normal(H, D, seed=2)), np.exp(0.5 * np.array(normal(H, D, seed=5)))
    )
    formats = parse_pair(f"{k_quant}/{v_quant}")
    return TurboQuantReference(SHAPE, BLOCK, formats, constants, reproducible)


def stored(layer):
    """Pages with all tokens, and what the codec reads back: keys, values [H, T, D]."""
    pages = layer.store(empty_pages(layer, 6), KEYS, VALUES, chunk(0, T))
    keys = layer.key_codec.dequantize(layer.key_codec.quantize(KEYS))
    values = layer.value_codec.dequantize(layer.value_codec.quantize(VALUES))
    return pages, keys.swapaxes(0, 1), values.swapaxes(0, 1)


def chunk(start, end):
    return PrefillMetadata(TABLE, SLOTS[start:end], start, end - start)


def attend(queries, keys, values, sinks=None):
    return causal_attention(queries[None], keys[None], values[None], SCALE, sinks)[0]


def close(actual, expected):
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=2e-4)


@pytest.mark.parametrize("k_quant", KEY_FORMATS)
@pytest.mark.parametrize("v_quant", VALUE_FORMATS)
def test_decode_attends_to_what_the_codec_reads_back(k_quant, v_quant):
    layer = backend(k_quant, v_quant)
    pages, keys, values = stored(layer)
    metadata = DecodeMetadata(TABLE, mx.array([T]), SLOTS[-1:], T - 1, T)
    actual = layer.decode(pages, Rows(QUERIES[None, :, -1], metadata, SCALE))
    close(actual[0], attend(QUERIES[:, -1:], keys, values)[:, 0])


@pytest.mark.parametrize("k_quant", ["q8_0", "q4_0", "uint4"])
def test_a_later_chunk_reads_its_context_compressed_and_itself_exactly(k_quant):
    layer = backend(k_quant, "q3_0")
    pages, keys, values = stored(layer)
    own = KEYS[CONTEXT:].swapaxes(0, 1), VALUES[CONTEXT:].swapaxes(0, 1)
    actual = layer.prefill(pages, Chunk(QUERIES[:, CONTEXT:], *own, chunk(CONTEXT, T), SCALE))
    keys = mx.concatenate([keys[:, :CONTEXT], own[0]], axis=1)
    values = mx.concatenate([values[:, :CONTEXT], own[1]], axis=1)
    close(actual, attend(QUERIES[:, CONTEXT:], keys, values))


@pytest.mark.parametrize("start", [0, CONTEXT])
def test_reproducible_reads_everything_compressed_however_it_is_cut(start):
    layer = backend("q4_0", "q3_0", reproducible=True)
    pages, keys, values = stored(layer)
    own = KEYS[start:].swapaxes(0, 1), VALUES[start:].swapaxes(0, 1)
    actual = layer.prefill(pages, Chunk(QUERIES[:, start:], *own, chunk(start, T), SCALE))
    close(actual, attend(QUERIES[:, start:], keys, values))


def test_sinks_see_logits_with_the_centre():
    sinks = normal(H * G, seed=6) * 3
    layer = backend("q8_0", "q8_0")
    pages, keys, values = stored(layer)
    own = KEYS[CONTEXT:].swapaxes(0, 1), VALUES[CONTEXT:].swapaxes(0, 1)
    metadata = DecodeMetadata(TABLE, mx.array([T]), SLOTS[-1:], T - 1, T)
    decoded = layer.decode(pages, Rows(QUERIES[None, :, -1], metadata, SCALE, sinks))
    close(decoded[0], attend(QUERIES[:, -1:], keys, values, sinks)[:, 0])
    later = chunk(CONTEXT, T)
    prefilled = layer.prefill(pages, Chunk(QUERIES[:, CONTEXT:], *own, later, SCALE, sinks))
    keys = mx.concatenate([keys[:, :CONTEXT], own[0]], axis=1)
    values = mx.concatenate([values[:, :CONTEXT], own[1]], axis=1)
    close(prefilled, attend(QUERIES[:, CONTEXT:], keys, values, sinks))


def test_tokens_stored_singly_give_the_same_bytes():
    layer = backend("q5_0", "q3_0")
    together, _, _ = stored(layer)
    pages = empty_pages(layer, 6)
    for token in range(T):
        here = slice(token, token + 1)
        pages = layer.store(pages, KEYS[here], VALUES[here], chunk(token, token + 1))
    assert (pages.array == together.array).all().item()
