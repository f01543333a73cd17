"""Masks by position: the ones that mlx-lm's own caches give."""

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata


def rows(*lens: int) -> DecodeMetadata:
    seq_lens = mx.array(lens)
    return DecodeMetadata(mx.zeros((len(lens), 0)), seq_lens, seq_lens, seq_lens - 1, max(lens))


def chunk(context_len: int, query_len: int) -> PrefillMetadata:
    return PrefillMetadata(mx.zeros((1, 0)), mx.zeros((0,)), context_len, query_len)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("context_len", "query_len"), [(0, 1), (0, 6), (5, 1), (5, 6), (9, 2)])
def test_a_chunks_mask(context_len, query_len, window):
    expected = mlx_lm_cache.create_causal_mask(query_len, context_len, window_size=window)
    mask = causal_mask(chunk(context_len, query_len), window)
    assert mask.dtype == mx.bool_ and mx.array_equal(mask, expected)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_each_decode_row_sees_its_own_tokens(window):
    lens = (1, 7, 4)
    mask = causal_mask(rows(*lens), window)
    assert mask.shape == (3, 1, 1, 7)
    for row, length in zip(mask[:, 0, 0].tolist(), lens, strict=True):
        first = 0 if window is None else max(0, length - window)
        assert row == [first <= key < length for key in range(7)]


def test_layers_share_a_mask():
    metadata = chunk(3, 4)
    assert causal_mask(metadata) is causal_mask(metadata)
    assert causal_mask(metadata, 2) is not causal_mask(metadata)
