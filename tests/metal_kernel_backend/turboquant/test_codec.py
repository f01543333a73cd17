"""The codec: stored bytes against the oracle, error bounds, ugly inputs."""

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs, reference
from vllm_metal.metal_kernel_backend.turboquant.codec import (
    KeyCodec,
    Quantized,
    Quantizer,
    ValueCodec,
)
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS

FORMATS = list(KEY_FORMATS.values())
UNBIASED = [False, True]
NAMES = [format.name for format in FORMATS]

WORST = {2: 0.44, 3: 0.23, 4: 0.15, 5: 0.06, 6: 0.03, 8: 0.0100}
"""Largest relative error of any single vector, |y - y'| / |y|, for each number of bits."""

ROUNDING = 1e-3
"""Errors below it are those of a float16 scale: some ugly vectors are a codebook's own."""

SATURATED = 0.5
"""The same where every coordinate is +-65504: the largest after rotation are beyond any scale."""


def stored(x: np.ndarray, name: str, unbiased: bool) -> tuple[Quantized, np.ndarray]:
    """What is stored of rotated vectors, and what they read back as."""
    quantizer = Quantizer(KEY_FORMATS[name], x.shape[-1], unbiased=unbiased)
    quantized = quantizer.quantize(mx.array(x))
    return quantized, np.array(quantizer.dequantize(quantized))


def relative_error(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y| / |x| of each vector, in float64; 0 where both are zero."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1)
    return np.linalg.norm(x - y, axis=-1) / np.where(norm > 0, norm, 1)


@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_are_those_of_the_oracle(name, unbiased, head_size):
    format = KEY_FORMATS[name]
    cases = inputs.vectors(head_size, count=2) | inputs.beyond(head_size, count=1)
    del cases["subnormal"]  # devices may flush such numbers to zero; the scale is zero anyway
    x = np.concatenate(list(cases.values()))
    quantized, _ = stored(x, name, unbiased)
    for i, vector in enumerate(x):
        codes, scale, bias = reference.quantize(
            vector,
            format.midpoints(head_size),
            format.centroids(head_size),
            format.scale_factors(head_size),
            unbiased,
            format.has_bias,
        )
        assert (np.array(quantized.codes[i]) == codes).all()
        assert np.array(quantized.scales[i]) == scale
        if format.has_bias:
            assert np.array(quantized.biases[i]) == bias


@pytest.mark.parametrize("name", NAMES)
def test_many_vectors_at_once_are_stored_as_few(name):
    """Large batches compare midpoint by midpoint, small ones all at once."""
    x = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    quantized, _ = stored(x, name, False)
    few, _ = stored(x[:7], name, False)
    assert (np.array(quantized.codes[:7]) == np.array(few.codes)).all()
    assert (np.array(quantized.scales[:7]) == np.array(few.scales)).all()


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_codes_read_back_as_the_codebook(name, head_size):
    format = KEY_FORMATS[name]
    codes = np.arange(format.num_codes, dtype=np.uint8)
    quantizer = Quantizer(format, head_size, unbiased=False)
    assert (np.array(quantizer.centroids(mx.array(codes))) == format.centroids(head_size)).all()


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_ugly_vectors_stay_within_bounds(name, head_size):
    """Signs and rotation first, as for values. The bound is that of the bits, for every case."""
    for case, x in inputs.vectors(head_size).items():
        codec = ValueCodec(KEY_FORMATS[name], head_size)
        codec.quantizer = Quantizer(KEY_FORMATS[name], head_size, unbiased=False)
        error = relative_error(x, np.array(codec.dequantize(codec.quantize(mx.array(x)))))
        limit = SATURATED if case == "largest float16" else WORST[KEY_FORMATS[name].bits]
        assert (error <= limit).all(), (case, error.max())


@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_are_exact(name, unbiased):
    quantized, y = stored(np.zeros((3, 64), np.float32), name, unbiased)
    assert (np.array(quantized.scales) == 0).all() and (y == 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("uint")])
def test_affine_formats_hold_constants_exactly(name):
    _, y = stored(np.full((2, 64), 0.375, np.float32), name, False)
    assert (y == 0.375).all()


@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize("name", NAMES)
def test_what_no_scale_can_hold_is_finite(name, unbiased):
    for case, x in inputs.beyond(64).items():
        quantized, y = stored(x, name, unbiased)
        assert np.isfinite(np.array(quantized.scales, np.float32)).all(), case
        assert np.isfinite(y).all(), case
        assert (np.abs(y) <= np.maximum(2 * np.abs(x.astype(np.float64)), 1e-6)).all(), case


@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize(
    "family",
    [
        ["q2_0", "q3_0", "q4_0", "q5_0", "q6_0", "q8_0"],
        ["int2", "int4", "int8"],
        ["uint2", "uint4", "uint8"],
    ],
)
def test_error_falls_with_bits(family, unbiased):
    for case, x in inputs.vectors(128).items():
        errors = []
        for name in family:
            codec = ValueCodec(KEY_FORMATS[name], 128)
            codec.quantizer = Quantizer(KEY_FORMATS[name], 128, unbiased=unbiased)
            y = np.array(codec.dequantize(codec.quantize(mx.array(x))))
            errors.append(relative_error(x, y).mean())
        if case == "zeros":
            assert errors == [0] * len(family)
        else:
            coarse = [error for error in errors if error > ROUNDING]
            assert (np.diff(coarse) < 0).all(), (case, errors)
            assert errors[: len(coarse)] == coarse, (case, errors)


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_searched_scales_beat_lloyd_max(bits, limit, head_size):
    x = np.random.default_rng(1).standard_normal((4000, head_size)).astype(np.float32)
    _, y = stored(x, f"q{bits}_0", False)
    assert ((x - y) ** 2).sum() / (x**2).sum() <= limit


COSINES = {"q8_0": 0.99997, "q6_0": 0.99974, "q5_0": 0.99900, "q4_0": 0.9959, "q3_0": 0.9830}


@pytest.mark.parametrize("name", COSINES)
def test_cosine_of_random_bfloat16_vectors(name):
    """Head size 128, one scale for a vector: b + 1/8 bits per coordinate."""
    x = mx.random.normal((2000, 1, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    codec = KeyCodec(KEY_FORMATS[name], np.zeros((1, 128)), np.ones((1, 128)))
    y = np.array(codec.dequantize(codec.quantize(x)))[:, 0].astype(np.float64)
    x = np.array(x.astype(mx.float32))[:, 0].astype(np.float64)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert cosine.mean() >= COSINES[name]


@pytest.mark.parametrize("name", list(VALUE_FORMATS))
def test_value_scales_are_unbiased(name):
    """<x, x'> = <x, x>, but for the rounding of the scale to float16."""
    x = np.random.default_rng(2).standard_normal((500, 64)).astype(np.float32)
    codec = ValueCodec(VALUE_FORMATS[name], 64)
    y = np.array(codec.dequantize(codec.quantize(mx.array(x))))
    ratio = (x * y).sum(-1) / (x * x).sum(-1)
    np.testing.assert_allclose(ratio, 1, atol=6e-4)
    assert abs(ratio.mean() - 1) < 1e-4


def test_key_scales_have_the_least_squared_error():
    """No other scale of the same codes comes closer: the error is orthogonal to the centroids."""
    x = np.random.default_rng(3).standard_normal((500, 64)).astype(np.float32)
    _, y = stored(x, "q3_0", False)
    assert np.abs(((x - y) * y).sum(-1) / (y * y).sum(-1)).max() < 6e-4


def random_constants(heads: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    centre = 5 * rng.standard_normal((heads, head_size))
    multiplier = np.exp(0.5 * rng.standard_normal((heads, head_size)))
    return centre.astype(np.float32), multiplier.astype(np.float32)


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_scores_are_those_of_centred_keys(head_size):
    """q'.k' = q.(k - centre), for every query head of a group; nothing is quantised."""
    centre, multiplier = random_constants(2, head_size)
    codec = KeyCodec(KEY_FORMATS["q8_0"], centre, multiplier)
    rng = np.random.default_rng(5)
    keys = centre + rng.standard_normal((7, 2, head_size)).astype(np.float32)
    queries = rng.standard_normal((4, 6, head_size)).astype(np.float32)
    rotated_keys = np.array(codec.rotate_keys(mx.array(keys)))
    rotated_queries = np.array(codec.rotate_queries(mx.array(queries)))
    for head in range(6):
        scores = rotated_queries[:, head] @ rotated_keys[:, head // 3].T
        expected = queries[:, head] @ (keys - centre)[:, head // 3].T
        np.testing.assert_allclose(scores, expected, atol=2e-4)
        uncentred = rotated_keys[:, head // 3] + np.array(codec.rotated_centre)[head // 3]
        scores = rotated_queries[:, head] @ uncentred.T
        np.testing.assert_allclose(scores, queries[:, head] @ keys[:, head // 3].T, atol=1e-3)


@pytest.mark.parametrize("k_quant", NAMES)
def test_attention_over_codes_is_attention_over_their_meaning(k_quant):
    """Rotated queries on rotated codes give what the oracle gives on dequantised vectors."""
    centre, multiplier = random_constants(2, 64)
    key_codec = KeyCodec(KEY_FORMATS[k_quant], centre, multiplier)
    value_codec = ValueCodec(VALUE_FORMATS["q4_0"], 64)
    rng = np.random.default_rng(6)
    keys = (centre + rng.standard_normal((19, 2, 64))).astype(np.float32)
    values = rng.standard_normal((19, 2, 64)).astype(np.float32)
    query = rng.standard_normal((1, 4, 64)).astype(np.float32)
    stored_keys = key_codec.quantize(mx.array(keys))
    stored_values = value_codec.quantize(mx.array(values))

    rotated = key_codec.rotate_queries(mx.array(query)).reshape(2, 2, 64)
    scores = 0.125 * rotated @ key_codec.quantizer.dequantize(stored_keys).transpose(1, 2, 0)
    weights = mx.softmax(scores, axis=-1)
    merged = weights @ value_codec.quantizer.dequantize(stored_values).swapaxes(0, 1)
    outputs = np.array(value_codec.unrotate_outputs(merged)).reshape(4, 1, 64)

    expected = reference.attention(
        query.swapaxes(0, 1),
        np.array(key_codec.dequantize(stored_keys)).swapaxes(0, 1),
        np.array(value_codec.dequantize(stored_values)).swapaxes(0, 1),
        0.125,
    )
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


def test_centring_and_multiplying_help_keys_that_need_them():
    """Keys with a large shared mean and uneven channels, as real ones have."""
    centre, multiplier = random_constants(1, 64)
    rng = np.random.default_rng(7)
    keys = (centre + rng.standard_normal((400, 1, 64)) / multiplier).astype(np.float32)
    queries = (rng.standard_normal((100, 64)) * multiplier[0]).astype(np.float32)

    def noise(c: np.ndarray, m: np.ndarray) -> float:
        codec = KeyCodec(KEY_FORMATS["q4_0"], c, m)
        error = np.array(codec.dequantize(codec.quantize(mx.array(keys)))) - keys
        logits = queries @ error[:, 0].T
        return float((logits - logits.mean(-1, keepdims=True)).std())

    plain = noise(np.zeros_like(centre), np.ones_like(centre))
    centred = noise(centre, np.ones_like(centre))
    both = noise(centre, multiplier)
    assert centred < 0.5 * plain and both < 0.9 * centred
