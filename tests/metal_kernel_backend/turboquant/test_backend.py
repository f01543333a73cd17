"""What all TurboQuant pages share: names, bytes, refusals, and exact first chunks."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.pages import empty_pages
from vllm_metal.attention.backend import Chunk, LayerShape
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.turboquant.backend import TurboQuantAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

BLOCK, LENGTH = 16, 21
SHAPE = LayerShape(num_kv_heads=2, head_size=64, head_size_v=64)


def on_operations(pair: str, shape=SHAPE, block_size=BLOCK, page_bytes=0) -> TurboQuantAttention:
    constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
    formats = parse_pair(pair)
    return TurboQuantReference(shape, block_size, formats, constants, page_bytes=page_bytes)


def on_kernels(pair: str, shape=SHAPE, block_size=BLOCK, page_bytes=0) -> TurboQuantAttention:
    constants = KeyConstants.neutral(shape.num_kv_heads, shape.head_size)
    formats = parse_pair(pair)
    return TurboQuantFused(
        shape, block_size, formats, constants, HostTarget(), page_bytes=page_bytes
    )


@pytest.fixture(params=[on_operations, on_kernels])
def make(request):
    return request.param


def test_names(make):
    layer = make("uint4/q3_0")
    assert layer.compressed and layer.format_names == ("uint4", "q3_0")
    assert layer.name.startswith("turboquant uint4/q3_0")


def test_the_layout_owns_the_bytes(make):
    layer = make("q8_0/q3_0")
    assert layer.slot_size == (64 + 2) + (24 + 2)
    assert layer.page_size_bytes == layer.layout.page_size_bytes == BLOCK * 2 * 92
    assert layer.bits_per_element == 8 * 92 / 128
    assert make("q8_0/q3_0", page_bytes=4096).page_size_bytes == 4096


def test_what_cannot_be_laid_out_is_refused(make):
    with pytest.raises(ValueError, match="head size 72 has no rotation"):
        make("q8_0/q3_0", LayerShape(2, 72, 64))
    with pytest.raises(ValueError, match="block size 12"):
        make("q8_0/q3_0", block_size=12)


def test_a_first_chunk_is_exact(make):
    """Whatever the pages make of its keys and values."""
    layer = make("q3_0/q2_0")
    rng = np.random.default_rng(0)
    queries, keys, values = (
        rng.standard_normal((heads, LENGTH, 64)).astype(np.float32) for heads in (6, 2, 2)
    )
    metadata = PrefillMetadata(mx.array([[2, 1]]), mx.arange(LENGTH), 0, LENGTH)
    chunk = Chunk(*map(mx.array, (queries, keys, values)), metadata, 0.125)
    out = layer.prefill(empty_pages(layer, 3), chunk)
    np.testing.assert_allclose(
        np.array(out), reference.attention(queries, keys, values, 0.125), atol=2e-5
    )
