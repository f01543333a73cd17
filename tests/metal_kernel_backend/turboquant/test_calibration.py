"""Calibration: the moments, the multiplier's optimum, and where the model is asked to look."""

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.calibration import (
    MAX_MULTIPLIER,
    ROW_TOKENS,
    KeyConstants,
    Moments,
    calibrate,
    row_offsets,
)


def sample(seed: int, tokens: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Queries [T, 4, 8] and keys [T, 2, 8] with means and spreads of their own per channel."""
    rng = np.random.default_rng(seed)
    spread = np.exp(np.linspace(-2, 2, 8))
    queries = rng.standard_normal((tokens, 4, 8)) * spread[::-1]
    keys = 3 + rng.standard_normal((tokens, 2, 8)) * spread
    return queries.astype(np.float32), keys.astype(np.float32)


def constants(*samples: tuple[np.ndarray, np.ndarray]) -> KeyConstants:
    moments = Moments()
    for one in samples:
        moments.add(one)
    return moments.constants()


def test_centre_is_the_mean_key_of_all_samples():
    first, second = sample(0, 300), sample(1, 100)
    expected = np.concatenate([first[1], second[1]]).mean(axis=0)
    np.testing.assert_allclose(constants(first, second).centre, expected, rtol=1e-5)


def test_multiplier_is_the_least_of_the_noise():
    """sum E[q^2] / m^2 times sum m^2 Var[k] is what it minimises: no neighbour is lower."""
    queries, keys = sample(2)
    found = constants((queries, keys)).multiplier.astype(np.float64)
    energy = (queries.reshape(300, 2, 2, 8) ** 2).mean(axis=(0, 2))
    variance = keys.var(axis=0)

    def noise(m: np.ndarray) -> np.ndarray:
        return (energy / m**2).sum(-1) * (m**2 * variance).sum(-1)

    rng = np.random.default_rng(0)
    for _ in range(50):
        other = found * np.exp(0.1 * rng.standard_normal(found.shape))
        assert (noise(other) >= noise(found)).all()
    assert (noise(found) < 0.5 * noise(np.ones_like(found))).all()


def test_without_queries_only_the_centre_is_known():
    queries, keys = sample(4)
    found = constants((None, keys))
    np.testing.assert_array_equal(found.centre, constants((queries, keys)).centre)
    assert (found.multiplier == 1).all()


def test_multiplier_has_geometric_mean_one():
    multiplier = constants(sample(3)).multiplier
    np.testing.assert_allclose(np.log(multiplier).mean(axis=-1), 0, atol=1e-5)


def test_dead_channels_stay_bounded():
    """Keys that never vary, queries that are always zero, or both."""
    queries, keys = sample(4)
    keys[..., 0] = 1.5
    queries[..., 1] = 0
    keys[..., 2] = 0
    queries[..., 2] = 0
    multiplier = constants((queries, keys)).multiplier
    assert np.isfinite(multiplier).all()
    assert (multiplier >= 1 / (1.001 * MAX_MULTIPLIER)).all()
    assert (multiplier <= 1.001 * MAX_MULTIPLIER).all()
    dead = constants((np.zeros_like(queries), np.zeros_like(keys)))
    assert (dead.multiplier == 1).all() and (dead.centre == 0).all()


def test_without_samples_there_are_no_constants():
    with pytest.raises(ValueError, match="no calibration samples"):
        Moments().constants()


def test_neutral_constants_change_nothing():
    neutral = KeyConstants.neutral(2, 8)
    assert (neutral.centre == 0).all() and (neutral.multiplier == 1).all()
    assert neutral.centre.shape == neutral.multiplier.shape == (2, 8)


@pytest.mark.parametrize("max_model_len", [1, 100, 240, 241, 400, 1024, 8192, 131072])
def test_rows_cover_the_positions_and_no_more(max_model_len):
    length = min(240, max_model_len)
    offsets = row_offsets(max_model_len, length)
    assert offsets[0] == 0 and offsets == sorted(set(offsets))
    assert offsets[-1] + length <= max_model_len
    assert max_model_len < 2 * length or offsets[-1] + length == max_model_len
    assert len(offsets) <= 2 + np.log2(max_model_len / length + 1) + 1


def calibrated(beginning: list[int], text: list[int], max_model_len: int):
    """The constants of one layer, and the calls that gave its samples."""
    calls = []

    def collect(token_ids, offset):
        assert 1 <= len(token_ids) <= ROW_TOKENS and offset + len(token_ids) <= max_model_len
        calls.append((list(token_ids), offset))
        return [sample(offset, len(token_ids)), sample(offset + 1, len(token_ids))]

    return calibrate(collect, beginning, text, max_model_len), calls


def test_the_model_is_asked_for_pieces_of_the_text_at_the_rows():
    found, calls = calibrated([], list(range(500)), 2048)
    assert len(found) == 2
    length = len(calls[0][0])
    assert [offset for _, offset in calls] == row_offsets(2048, length)
    keys = np.concatenate([sample(offset, length)[1] for _, offset in calls])
    np.testing.assert_allclose(found[0].centre, keys.mean(axis=0), rtol=1e-5)
    queries = np.concatenate([sample(offset, length)[0] for _, offset in calls])
    expected = constants((queries, keys)).multiplier
    np.testing.assert_allclose(found[0].multiplier, expected, rtol=1e-5)


@pytest.mark.parametrize("tokens", [30, 239, 240, 241, 442, 480, 481, 500])
def test_the_whole_text_is_read(tokens):
    """Also where it is no whole number of rows."""
    _, calls = calibrated([], list(range(tokens)), 8192)
    assert {token for token_ids, _ in calls for token in token_ids} == set(range(tokens))


def test_every_row_begins_as_a_prompt_does():
    beginning = [900, 901, 902, 903, 904, 905]
    found, calls = calibrated(beginning, list(range(500)), 2048)
    assert all(token_ids[:6] == beginning for token_ids, _ in calls)
    assert all(900 > max(token_ids[6:]) for token_ids, _ in calls)
    keys = np.concatenate([sample(offset, len(ids))[1][6:] for ids, offset in calls])
    np.testing.assert_allclose(found[0].centre, keys.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("beginning", [[], [900]])
@pytest.mark.parametrize("max_model_len", [1, 2, 5, 16, 4096])
def test_short_texts_and_short_models_work(beginning, max_model_len):
    found, _ = calibrated(beginning, list(range(30)), max_model_len)
    assert np.isfinite(found[0].centre).all() and np.isfinite(found[0].multiplier).all()
