"""Dense or TurboQuant, decided in one place."""

import mlx.core as mx
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend import selection
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused
from vllm_metal.metal_kernel_backend.turboquant.reference import TurboQuantReference

SHAPES = [LayerShape(2, 64, 64)] * 6


def kinds(config, shapes=SHAPES):
    return [
        type(b) for b in make_backends(shapes, 16, mx.float32, config, neutral_constants(shapes))
    ]


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(selection, "available_target", HostTarget)


def test_where_there_are_kernels_all_layers_are_on_them(kernels):
    assert kinds(None) == [DenseFused] * 6
    config = TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(2,))
    assert kinds(config) == [TurboQuantFused] * 2 + [DenseFused] + [TurboQuantFused] * 3
    assert all(
        backend.stores_through
        for backend in make_backends(SHAPES, 16, mx.float16, None, neutral_constants(SHAPES))
    )


def backends(shape: LayerShape, block_size: int = 16):
    shapes = [shape, SHAPES[0]]
    return make_backends(shapes, block_size, mx.float16, None, neutral_constants(shapes))


@pytest.mark.parametrize(
    ("shape", "block_size", "reason"),
    [
        (LayerShape(1, 576, 576), 16, "its head sizes 576 and 576 are over 512"),
        (LayerShape(2, 64, 64), 12, "its blocks of 12 tokens are not a multiple of 8"),
    ],
)
def test_a_dense_layer_that_kernels_cannot_decode_is_said_to_be_slow(
    kernels, caplog, shape, block_size, reason
):
    selection._say_why_not.cache_clear()
    with caplog.at_level("WARNING", "vllm.metal.cache"):
        assert type(backends(shape, block_size)[0]) is DensePages
    [record] = caplog.records
    assert reason in record.getMessage() and "several times as long" in record.getMessage()


def test_what_a_model_fetches_is_stored_by_kernels_unless_it_is_one_array(kernels, caplog):
    with caplog.at_level("WARNING", "vllm.metal.cache"):
        assert type(backends(LayerShape(1, 512, 64, fetched=True))[0]) is DenseFused
        assert type(backends(LayerShape(1, 576, 64, fetched=True))[0]) is DenseFused
        assert type(backends(LayerShape(1, 128, 0, fetched=True))[0]) is DensePages
    assert caplog.records == []


def test_dense_without_turboquant_never_calibrates():
    def fail():
        raise AssertionError("calibrated")

    assert len(make_backends(SHAPES, 16, mx.float16, None, fail)) == 6
    assert kinds(None) == [DensePages] * 6


def test_every_layer_is_compressed():
    assert kinds(TurboQuantConfig(parse_pair("q8_0/q3_0"))) == [TurboQuantReference] * 6


def test_skipped_and_boundary_layers_stay_dense():
    config = TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(2,), boundary=1)
    dense = [layer for layer, kind in enumerate(kinds(config)) if kind is DensePages]
    assert dense == [0, 2, 5]


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="layer 6 .allowed: 0 to 5"):
        kinds(TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(6,)))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [([], "it has no keys and values"), ([LayerShape(2, 64, 64)], "all its layers are in skip")],
)
def test_a_model_with_nothing_to_compress_is_refused(shapes, reason):
    config = TurboQuantConfig(parse_pair("q8_0/q3_0"), boundary=1)
    with pytest.raises(UserError, match=reason):
        make_backends(shapes, 16, mx.float16, config, neutral_constants(shapes))


def test_a_head_size_without_rotation_is_refused_with_its_layer():
    shapes = [LayerShape(2, 64, 64), LayerShape(2, 72, 64)]
    with pytest.raises(UserError, match="layer 1: head size 72"):
        kinds(TurboQuantConfig(parse_pair("q8_0/q3_0")), shapes)
    skipping = TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(1,))
    assert kinds(skipping, shapes) == [TurboQuantReference, DensePages]


MLA = LayerShape(1, 512, 64, fetched=True)
INDEX = LayerShape(1, 128, 0, fetched=True)


@pytest.mark.parametrize("shape", [MLA, INDEX], ids=str)
def test_a_latent_is_refused_by_name_and_served_dense(shape):
    with pytest.raises(UserError, match="layer 0: its cache holds a latent .MLA."):
        kinds(TurboQuantConfig(parse_pair("q8_0/q3_0")), [shape] * 5)
    assert kinds(None, [shape] * 5) == [DensePages] * 5
    skipping = TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(0,))
    assert kinds(skipping, [shape, SHAPES[0]]) == [DensePages, TurboQuantReference]


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_ordinary_heads_that_are_fetched_are_compressed(num_kv_heads):
    shapes = [LayerShape(num_kv_heads, 256, 256, fetched=True)]
    assert kinds(TurboQuantConfig(parse_pair("q8_0/q3_0")), shapes) == [TurboQuantReference]
