"""Formats: sizes, and codebooks against the exact Lloyd-Max quantiser."""

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    LEVEL_BASE,
    LEVEL_UNIT,
    NUM_LEVELS,
    VALUE_FORMATS,
    key_format,
    parse_pair,
    value_format,
)

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256)
FORMATS = list(KEY_FORMATS.values())


def marginal(head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and probabilities of one coordinate of a random vector of norm sqrt(head_size)."""
    t = np.linspace(-1, 1, 200_001)
    weights = (1 - t * t) ** ((head_size - 3) / 2)
    return t * np.sqrt(head_size), weights / weights.sum()


def mean_squared_error(centroids: np.ndarray, head_size: int) -> float:
    """Error of the nearest centroid over the marginal, by direct summation."""
    points, probability = marginal(head_size)
    nearest = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, points)
    return float(((points - centroids[nearest]) ** 2 * probability).sum())


def lloyd_max(bits: int, head_size: int) -> np.ndarray:
    """Lloyd's algorithm, cell by cell, from equally likely cells to rest."""
    points, probability = marginal(head_size)
    cumulative = np.cumsum(probability)
    ranks = (np.arange(1 << bits) + 0.5) / (1 << bits)
    centroids = np.interp(ranks, cumulative, points)
    mass, moment = (
        np.concatenate([[0], np.cumsum(x)]) for x in (probability, probability * points)
    )
    for _ in range(3000):
        edges = np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(points)]])
        centroids = np.diff(moment[edges]) / np.diff(mass[edges])
    return centroids


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_within_one_percent_of_lloyd_max(bits, head_size):
    centroids = value_format(f"q{bits}_0").centroids(head_size).astype(np.float64)
    exact = mean_squared_error(lloyd_max(bits, head_size), head_size)
    assert exact * 0.9999 <= mean_squared_error(centroids, head_size) <= exact * 1.01


@pytest.mark.parametrize(("bits", "gaussian"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_error_tends_to_the_gaussian_values(bits, gaussian):
    centroids = value_format(f"q{bits}_0").centroids(512).astype(np.float64)
    assert mean_squared_error(centroids, 512) == pytest.approx(gaussian, rel=0.01)


def test_two_bits_are_the_closed_form():
    """At 2 bits a cubic passes through all four centroids of the Gaussian limit."""
    centroids = value_format("q2_0").centroids(512)
    assert centroids[2:] == pytest.approx([0.4528, 1.5104], rel=5e-3)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_codebook_is_increasing_antisymmetric_and_a_polynomial(format):
    for head_size in HEAD_SIZES:
        centroids = format.centroids(head_size)
        assert centroids.dtype == np.float32 and len(centroids) == 1 << format.bits
        assert (np.diff(centroids) > 0).all()
        assert (centroids == -centroids[::-1]).all()
        x = np.arange(1 << format.bits) - ((1 << format.bits) - 1) / 2
        terms = format.coefficients(head_size).astype(np.float64)
        value = sum(c * x ** (2 * i + 1) for i, c in enumerate(terms))
        np.testing.assert_allclose(centroids, value, rtol=1e-6)


def test_long_keys_of_four_and_more_bits_have_levels():
    """A uniform grid over (-4, 4), and half a halfword for each 32 coordinates, rounded up."""
    for format in FORMATS:
        expected = format.name in ("q4_0", "q5_0", "q6_0", "q8_0")
        assert format.has_levels(128) == expected and not format.has_levels(112)
        if expected:
            assert format.coefficients(128).tolist() == [8 / format.num_codes]
            assert format.num_terms(128) == 1 and format.levels_bytes(64) == 0
            assert [format.levels_bytes(size) for size in (128, 160, 192, 256)] == [4, 6, 6, 8]
    assert not any(format.has_levels(512) for format in VALUE_FORMATS.values())


def test_weights_of_levels_are_exact_in_half_precision():
    weights = (LEVEL_BASE + np.arange(NUM_LEVELS)) * LEVEL_UNIT
    assert (weights.astype(np.float16) == weights).all() and weights.max() < 1


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_midpoints_lie_between_centroids(format):
    centroids, midpoints = format.centroids(64), format.midpoints(64)
    assert (centroids[:-1] < midpoints).all() and (midpoints < centroids[1:]).all()
    np.testing.assert_allclose(midpoints, (centroids[1:] + centroids[:-1]) / 2, atol=1e-6)


def test_coefficients_are_the_same_in_every_process():
    """They are committed here so that a change of the fit, which changes stored bytes, is seen."""
    expected = {
        "q2_0": (0.8922697, 0.04787265),
        "q3_0": (0.47009867, 0.01077081),
        "q4_0": (0.26005709, 1.4037501e-4, 2.6631782e-5),
        "q5_0": (0.13638744, -4.9704653e-5, 1.2909861e-6),
        "q6_0": (0.061165117, 4.5990408e-5),
        "q8_0": (1 / 32,),
        "int4": (0.5,),
    }
    for name, coefficients in expected.items():
        np.testing.assert_allclose(
            KEY_FORMATS[name].coefficients(64), coefficients, rtol=2e-6, atol=1e-10
        )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_sizes(head_size):
    for name, bits in [
        ("q8_0", 8),
        ("q6_0", 6),
        ("q5_0", 5),
        ("q4_0", 4),
        ("q3_0", 3),
        ("q2_0", 2),
    ]:
        levels = -(-head_size // 64) * 2 if head_size >= 128 and bits >= 4 else 0
        assert key_format(name).vector_bytes(head_size) == head_size * bits // 8 + 2 + levels
        assert value_format(name).vector_bytes(head_size) == head_size * bits // 8 + 2
    for bits in (2, 4, 8):
        assert key_format(f"int{bits}").vector_bytes(head_size) == head_size * bits // 8 + 2
        assert key_format(f"uint{bits}").vector_bytes(head_size) == head_size * bits // 8 + 4
    assert value_format("q4_0").bits_per_element(head_size) == 4 + 16 / head_size
    assert key_format("q4_0").bits_per_element(128) == 4 + 3 / 8


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="k_quant is 'q7_0'; allowed: .*q8_0.*uint8"):
        key_format("q7_0")
    with pytest.raises(ValueError, match="v_quant is 'int8'; allowed: q2_0, .*q8_0$"):
        value_format("int8")
    assert set(VALUE_FORMATS) == {"q2_0", "q3_0", "q4_0", "q5_0", "q6_0", "q8_0"}


def test_a_pair_as_text():
    pair = parse_pair("uint4/q3_0")
    assert pair == (KEY_FORMATS["uint4"], VALUE_FORMATS["q3_0"])
    assert str(pair) == "uint4/q3_0"
    for text in ("", "q8_0", "q8_0 q3_0"):
        with pytest.raises(ValueError, match=f"'{text}' is not KEYS/VALUES"):
            parse_pair(text)
    with pytest.raises(ValueError, match="k_quant is ''; allowed: "):
        parse_pair("/q3_0")
    with pytest.raises(ValueError, match="v_quant is 'q3_0/q3_0'; allowed: "):
        parse_pair("q8_0/q3_0/q3_0")
