"""The quantiser of long keys: stored bytes against the oracle, error bounds, ugly inputs."""

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs, reference
from vllm_metal.metal_kernel_backend.turboquant import grouped_quantizer as module
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import GroupedQuantizer
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized, Quantizer
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs

NAMES = ["q4_0", "q5_0", "q6_0", "q8_0"]

WORST = {4: 0.12, 5: 0.06, 6: 0.03, 8: 0.0075}
"""Largest relative error of any single vector, |y - y'| / |y|, for each number of bits."""

ROUNDING = 1e-3
"""Errors below it are those of a float16 scale: some ugly vectors are a grid's own."""


def stored(x: np.ndarray, name: str) -> tuple[Quantized, np.ndarray]:
    """What is stored of rotated keys, and what they read back as."""
    quantizer = GroupedQuantizer(KEY_FORMATS[name], x.shape[-1])
    quantized = quantizer.quantize(mx.array(x))
    return quantized, np.array(quantizer.dequantize(quantized))


def rotated(x: np.ndarray) -> np.ndarray:
    """As the codec does it, before anything is quantised."""
    return np.array(rotate(mx.array(x.astype(np.float32) * signs(x.shape[-1]))))


@pytest.mark.parametrize("head_size", [128, 160, 256])
@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes_are_those_of_the_oracle(name, head_size):
    format = KEY_FORMATS[name]
    cases = inputs.vectors(head_size, count=2) | inputs.beyond(head_size, count=1)
    del cases["subnormal"]  # devices may flush such numbers to zero; the scale is zero anyway
    x = np.concatenate([*cases.values(), rotated(cases["one channel 1000 times the rest"])])
    quantized, _ = stored(x, name)
    for i, vector in enumerate(x):
        codes, levels, scale = reference.quantize_with_levels(
            vector, format.bits, format.scale_factors(head_size)
        )
        assert (np.array(quantized.codes[i]) == codes).all()
        assert (np.array(quantized.levels[i]) == levels).all()
        assert np.array(quantized.scales[i]) == scale


def test_magnitudes_on_the_edge_of_a_grid_and_next_to_it():
    """Where a group's largest magnitude is where a level's grid ends, the next level is meant."""
    format = KEY_FORMATS["q8_0"]
    factors = format.scale_factors(128)
    x = np.random.default_rng(0).standard_normal((3 * 5 * 16, 128)).astype(np.float32)
    x = np.clip(x, -0.3, 0.3)
    x[:, 0] = 1.7
    edges = np.array([f * x[0, 0] * np.float32(0.125) * n for f in factors for n in range(12, 28)])
    edges = edges.astype(np.float32)
    beside = np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(9))
    x[:, 17] = np.concatenate([edges, *beside])
    quantized, _ = stored(x, "q8_0")
    for i, vector in enumerate(x):
        codes, levels, scale = reference.quantize_with_levels(vector, 8, factors)
        assert (np.array(quantized.levels[i]) == levels).all()
        assert (np.array(quantized.codes[i]) == codes).all()
        assert np.array(quantized.scales[i]) == scale


@pytest.mark.parametrize("name", NAMES)
def test_many_keys_are_stored_as_few(monkeypatch, name):
    """They are quantised slice by slice, the last one short."""
    x = np.random.default_rng(0).standard_normal((7, 3, 128)).astype(np.float32)
    whole, _ = stored(x, name)
    monkeypatch.setattr(module, "SLICE", 4 * 128)
    parts, _ = stored(x, name)
    assert parts.codes.shape == (7, 3, 128) and parts.levels.shape == (7, 3, 8)
    for field in ("codes", "levels", "scales"):
        assert (np.array(getattr(parts, field)) == np.array(getattr(whole, field))).all()


@pytest.mark.parametrize("head_size", [128, 192])
@pytest.mark.parametrize("name", NAMES)
def test_ugly_vectors_stay_within_bounds(name, head_size):
    for case, x in inputs.vectors(head_size).items():
        if case == "largest float16":  # beyond any scale after rotation
            continue
        y = rotated(x)
        error = reference.relative_error(y, stored(y, name)[1])
        assert (error <= WORST[KEY_FORMATS[name].bits]).all(), (case, error.max())


@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_are_exact(name):
    quantized, y = stored(np.zeros((3, 128), np.float32), name)
    assert (np.array(quantized.scales) == 0).all() and (y == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_no_scale_can_hold_is_finite(name):
    for case, x in inputs.beyond(128).items():
        quantized, y = stored(x, name)
        assert np.isfinite(np.array(quantized.scales, np.float32)).all(), case
        assert (np.abs(y) <= np.maximum(2 * np.abs(x.astype(np.float64)), 1e-6)).all(), case


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_vector_that_is_not_finite_is_zeros_with_a_scale_of_nan(name, poison):
    """One element, or all of them; the vectors beside it are what they are without it."""
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    x[1] = x[3] = 0
    sound, _ = stored(x, name)
    x[1, 17], x[3] = poison, poison
    broken, y = stored(x, name)
    expected = np.array(sound.scales).view(np.uint16)
    expected[[1, 3]] = 0x7E00
    assert (np.array(broken.scales).view(np.uint16) == expected).all()
    for field in ("codes", "biases", "levels"):
        if getattr(sound, field) is not None:
            assert mx.array_equal(getattr(broken, field), getattr(sound, field))
    assert np.isnan(y[[1, 3]]).all() and np.isfinite(np.delete(y, [1, 3], axis=0)).all()


def test_error_falls_with_bits():
    for case, x in inputs.vectors(128).items():
        y = rotated(x)
        errors = [reference.relative_error(y, stored(y, name)[1]).mean() for name in NAMES]
        if case == "zeros":
            assert errors == [0] * len(NAMES)
        elif case != "largest float16":
            coarse = [error for error in errors if error > ROUNDING]
            assert (np.diff(coarse) < 0).all(), (case, errors)
            assert errors[: len(coarse)] == coarse, (case, errors)


@pytest.mark.parametrize(("name", "gain"), [("q4_0", 0.76), ("q5_0", 0.72), ("q8_0", 0.60)])
def test_levels_are_worth_their_bits(name, gain):
    """A quarter of a bit more than one scale alone, which would be worth a factor of 0.71."""
    x = np.random.default_rng(1).standard_normal((2000, 128)).astype(np.float32)
    plain = Quantizer([(VALUE_FORMATS[name], False)], 128)
    without = np.array(plain.dequantize(plain.quantize(mx.array(x))))
    assert ((x - stored(x, name)[1]) ** 2).sum() < gain * ((x - without) ** 2).sum()


def test_scales_have_the_least_squared_error():
    """No other scale of the same codes comes closer: the error is orthogonal to the centroids."""
    x = np.random.default_rng(3).standard_normal((500, 128)).astype(np.float32)
    _, y = stored(x, "q4_0")
    assert np.abs(((x - y) * y).sum(-1) / (y * y).sum(-1)).max() < 6e-4
