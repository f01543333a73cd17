"""The quantiser: stored bytes against the oracle, error bounds, ugly inputs."""

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs, reference
from vllm_metal.metal_kernel_backend.turboquant.codec import ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized, Quantizer

WITHOUT_LEVELS = KEY_FORMATS | VALUE_FORMATS
FORMATS = list(WITHOUT_LEVELS.values())
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
    quantizer = Quantizer([(WITHOUT_LEVELS[name], unbiased)], x.shape[-1])
    quantized = quantizer.quantize(mx.array(x))
    return quantized, np.array(quantizer.dequantize(quantized))


@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_are_those_of_the_oracle(name, unbiased, head_size):
    format = WITHOUT_LEVELS[name]
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
def test_steps_of_magnitudes_on_a_bound_and_next_to_it(name):
    """Bounds of every candidate scale, and the floats beside them: a quotient rounds to either."""
    format = WITHOUT_LEVELS[name]
    quantizer = Quantizer([(format, False)], 64)
    positive = format.midpoints(64)[format.num_codes // 2 :]
    for largest in np.exp(np.random.default_rng(0).uniform(-9, 9, 50)).astype(np.float32):
        bounds = (largest * format.scale_factors(64))[:, None] * positive
        beside = np.nextafter(bounds, np.float32(0)), np.nextafter(bounds, np.float32(np.inf))
        magnitudes = np.concatenate([bounds, *beside]).ravel()
        steps = quantizer._steps(mx.array(magnitudes[None, None]), mx.full((1, 1, 1), largest))
        expected = (magnitudes[:, None] >= bounds[:, None, :]).sum(axis=-1)
        assert (np.array(steps)[0] == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_many_vectors_at_once_are_stored_as_few(name):
    """Large batches compare midpoint by midpoint, small ones all at once."""
    x = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    quantized, _ = stored(x, name, False)
    few, _ = stored(x[:7], name, False)
    assert (np.array(quantized.codes[:7]) == np.array(few.codes)).all()
    assert (np.array(quantized.scales[:7]) == np.array(few.scales)).all()


@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize(("name", "other"), list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)))
def test_kinds_side_by_side_are_stored_as_alone(name, other, head_size):
    """Formats with other numbers of codes, terms and biases share every operation.

    Each format is paired with the next, so each stands on either side once.
    """
    cases = inputs.vectors(head_size, count=2) | inputs.beyond(head_size, count=2)
    x = mx.array(np.concatenate(list(cases.values())).reshape(-1, 2, head_size))
    kinds = (WITHOUT_LEVELS[name], False), (WITHOUT_LEVELS[other], True)
    together = Quantizer(kinds, head_size).quantize(x)
    for i, kind in enumerate(kinds):
        alone = Quantizer([kind], head_size).quantize(x[:, i])
        assert (np.array(together.codes[:, i]) == np.array(alone.codes)).all()
        assert (np.array(together.scales[:, i]) == np.array(alone.scales)).all()
        if kind[0].has_bias:
            assert (np.array(together.biases[:, i]) == np.array(alone.biases)).all()


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_codes_read_back_as_the_codebook(name, head_size):
    format = WITHOUT_LEVELS[name]
    codes = np.arange(format.num_codes, dtype=np.uint8)
    quantizer = Quantizer([(format, False)], head_size)
    assert (np.array(quantizer.centroids(mx.array(codes))) == format.centroids(head_size)).all()


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_ugly_vectors_stay_within_bounds(name, head_size):
    """Signs and rotation first, as for values. The bound is that of the bits, for every case."""
    for case, x in inputs.vectors(head_size).items():
        codec = ValueCodec(WITHOUT_LEVELS[name], head_size)
        codec.quantizer = Quantizer([(WITHOUT_LEVELS[name], False)], head_size)
        error = reference.relative_error(x, np.array(codec.dequantize(codec.quantize(mx.array(x)))))
        limit = SATURATED if case == "largest float16" else WORST[WITHOUT_LEVELS[name].bits]
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


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("unbiased", UNBIASED)
@pytest.mark.parametrize("name", NAMES)
def test_a_vector_that_is_not_finite_is_zeros_with_a_scale_of_nan(name, unbiased, poison):
    """One element, or all of them; the vectors beside it are what they are without it."""
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    x[1] = x[3] = 0
    sound, _ = stored(x, name, unbiased)
    x[1, 17], x[3] = poison, poison
    broken, y = stored(x, name, unbiased)
    expected = np.array(sound.scales).view(np.uint16)
    expected[[1, 3]] = 0x7E00
    assert (np.array(broken.scales).view(np.uint16) == expected).all()
    for field in ("codes", "biases"):
        if getattr(sound, field) is not None:
            assert mx.array_equal(getattr(broken, field), getattr(sound, field))
    assert np.isnan(y[[1, 3]]).all() and np.isfinite(np.delete(y, [1, 3], axis=0)).all()


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
            codec = ValueCodec(WITHOUT_LEVELS[name], 128)
            codec.quantizer = Quantizer([(WITHOUT_LEVELS[name], unbiased)], 128)
            y = np.array(codec.dequantize(codec.quantize(mx.array(x))))
            errors.append(reference.relative_error(x, y).mean())
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


def test_key_scales_have_the_least_squared_error():
    """No other scale of the same codes comes closer: the error is orthogonal to the centroids."""
    x = np.random.default_rng(3).standard_normal((500, 64)).astype(np.float32)
    _, y = stored(x, "q3_0", False)
    assert np.abs(((x - y) * y).sum(-1) / (y * y).sum(-1)).max() < 6e-4
