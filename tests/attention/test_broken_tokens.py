"""Broken tokens: what they are replaced by, and that every backend confines them."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.attention.paged_layer import BLOCK, GROUPED, PagedLayer, Request, error, fill
from vllm_metal.attention.broken_tokens import confined

SOUND = np.ones((2, 3, 8), np.float32), np.full((2, 3, 4), 2.0, np.float32)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_broken_token_is_a_key_of_nan_and_a_value_of_zeros(dtype, which, poison):
    given = [part.copy() for part in SOUND]
    given[which][1, 2, 3] = poison
    made = confined(*(mx.array(part).astype(dtype) for part in given))
    expected = [part.copy() for part in SOUND]
    expected[0][1, 2], expected[1][1, 2] = np.nan, 0
    for part, wanted in zip(made, expected, strict=True):
        assert part.dtype == dtype
        np.testing.assert_array_equal(np.array(part.astype(mx.float32)), wanted)


def test_the_largest_numbers_are_sound():
    largest = mx.full((1, 1, 8), 65504.0, mx.float16)
    for part in confined(largest, -largest):
        assert mx.all(mx.isfinite(part)).item()


def test_a_layer_may_have_no_values():
    keys = mx.array([[1.0, np.inf], [1.0, 2.0]])
    keys, values = confined(keys, mx.zeros((2, 0)))
    assert values.shape == (2, 0)
    assert mx.isnan(keys).tolist() == [[True, True], [False, False]]


BROKEN_AT = BLOCK + 2
"""Where the tests of broken tokens have theirs; only the second KV head has it."""


def broken(request: Request, field: str, poison: float) -> Request:
    vectors = getattr(request, field).copy()
    vectors[1, BROKEN_AT, 7] = poison
    return replace(request, **{field: vectors})


def split_by_broken_token(
    out: mx.array,  # [Hq, L, Dv]
    expected: np.ndarray,
    positions: range,
    window: int | None,
) -> tuple[mx.array, np.ndarray]:
    """Outputs without those that see the broken token, which must be NaN; and what is expected."""
    sees = [BROKEN_AT <= row < BROKEN_AT + (window or row + 1) for row in positions]
    affected = np.zeros(out.shape[:2], bool)
    affected[len(out) // 2 :, :] = sees
    made = np.array(out.astype(mx.float32))
    assert np.isnan(made[affected]).all()
    return mx.array(made[~affected]), expected[~affected]


@pytest.mark.parametrize("window", [None, 8], ids=["", "window"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["keys", "values"])
def test_a_broken_token_is_seen_by_its_own_request_alone(candidate, field, poison, window):
    """All that see a token with an element that is no number are NaN: neither the queries before
    it, nor those beyond its window, nor the batch, nor the next owner of its blocks."""
    layer = PagedLayer(candidate.make(replace(GROUPED, sliding_window=window), BLOCK))
    sound, other = layer.request(3 * BLOCK + 5, 4), layer.request(2 * BLOCK, 4)
    request = broken(sound, field, poison)
    for start, end in ((0, BLOCK + 5), (BLOCK + 5, 3 * BLOCK)):
        out = layer.prefill(request, start, end)
        expected = sound.expected(start, end)
        parts = split_by_broken_token(out, expected, range(start, end), window)
        assert error(*parts, sound) < candidate.tolerance, (start, end)
    fill(layer, other)
    for seq_len in (BROKEN_AT + 1, BROKEN_AT + 8, BROKEN_AT + 9, 3 * BLOCK + 1):
        out = layer.decode([request, other], lens=[seq_len, other.seq_len])
        expected = layer.expected_decode([sound, other], [seq_len, other.seq_len])
        last = range(seq_len - 1, seq_len)
        parts = split_by_broken_token(out[0][:, None], expected[0][:, None], last, window)
        assert error(*parts, sound) < candidate.tolerance, seq_len
        assert error(out[1], expected[1], other) < candidate.tolerance, seq_len
    heir = layer.request(BROKEN_AT, 4, block_ids=request.block_ids[:2])
    layer.prefill(heir, 0, BLOCK)
    out = layer.prefill(heir, BLOCK, BROKEN_AT - 1)
    assert error(out, heir.expected(BLOCK, BROKEN_AT - 1), heir) < candidate.tolerance
    out = layer.decode([heir])
    assert error(out, layer.expected_decode([heir]), heir) < candidate.tolerance


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["keys", "values"])
def test_a_broken_token_is_fetched_as_a_key_of_nan_and_a_value_of_zeros(candidate, field, poison):
    """A model's own attention replaces the scores that it masks, but multiplies every value."""
    layer = PagedLayer(candidate.make(GROUPED, BLOCK))
    request = broken(layer.request(2 * BLOCK, 4), field, poison)
    layer.prefill(request, 0, BLOCK)
    for start, end in ((BLOCK, BROKEN_AT + 2), (BROKEN_AT + 2, 2 * BLOCK)):
        layer.prefill(request, start, end)
        own = [mx.array(part[None, :, start:end]) for part in (request.keys, request.values)]
        keys, values = layer.backend.fetch(layer.pages, *own, layer.chunk(request, start, end))
        nan = np.zeros(keys.shape, bool)
        nan[0, 1, BROKEN_AT] = True
        np.testing.assert_array_equal(np.isnan(np.array(keys)), nan)
        assert np.isfinite(np.array(values)).all()
        assert not np.array(values)[0, 1, BROKEN_AT].any()
