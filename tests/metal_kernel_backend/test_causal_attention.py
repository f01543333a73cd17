"""Attention over gathered K/V: tiles make no difference but in memory; the mask of decode."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from vllm_metal.attention.backend import ChunkMemory
from vllm_metal.attention.metadata import DecodeMetadata
from vllm_metal.metal_kernel_backend import causal_attention as module


def qkv(query_len: int, seq_len: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (4, query_len, 32), (2, seq_len, 32), (2, seq_len, 16)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("sliding_window", [None, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("query_len", "seq_len"), [(50, 50), (50, 83), (33, 70), (1, 40)])
def test_row_tiles_give_the_whole(
    monkeypatch, query_len, seq_len, with_sinks, sliding_window, rows
):
    """Tiles of one row, the smallest there are, and of several, which share a mask."""
    queries, keys, values = qkv(query_len, seq_len)
    heads = len(queries)
    monkeypatch.setattr(module, "SCORE_TILE_BYTES", {mx.cpu: 4 * heads * seq_len * rows})
    assert module.scored_rows(query_len, seq_len, heads) == min(rows, query_len)
    sinks = np.array([0.5, -1, 2, 0], np.float32) if with_sinks else None
    out = module.causal_attention(
        *(mx.array(array)[None] for array in (queries, keys, values)),
        0.2,
        None if sinks is None else mx.array(sinks),
        sliding_window,
    )
    expected = reference.attention(queries, keys, values, 0.2, sinks, sliding_window or 0)
    np.testing.assert_allclose(np.array(out[0]), expected, atol=2e-6)


def test_a_chunk_fits_where_one_tile_does():
    """Ten tiles, where MLX is told to keep to one: it waits for each before it begins the next."""
    heads, query_len, seq_len = 8, 640, 4096
    tile = 4 * heads * seq_len * module.scored_rows(query_len, seq_len, heads)
    assert 10 * tile <= 4 * heads * seq_len * query_len
    queries = mx.zeros((1, heads, query_len, 16))
    keys = values = mx.zeros((1, heads, seq_len, 16))
    mx.eval(queries, keys, values)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    limit = mx.set_memory_limit(before + tile)
    mx.eval(module.causal_attention(queries, keys, values, 1.0, None))
    mx.set_memory_limit(limit)
    assert tile < mx.get_peak_memory() - before < 3 * tile


def test_a_tile_has_a_row_at_least_and_the_chunk_at_most():
    assert module.scored_rows(query_len=50, seq_len=1000, num_heads=4) == 50
    assert module.scored_rows(1 << 11, 1 << 27, 32) == 1
    whole = module.causal_memory(50, 1000, 4, None)
    assert whole == ChunkMemory(query_len=50, tokens=1000, scored_rows=50, score_bytes=4 * 4)
    assert module.causal_memory(50, 1000, 4, 128).score_bytes == 2 * whole.score_bytes


def test_valid_tokens_end_with_the_request():
    metadata = DecodeMetadata(
        block_table=mx.array([[1, 2], [3, 0], [4, 0]]),
        seq_lens=mx.array([6, 1, 4]),
        slot_mapping=mx.array([0, 0, 0]),
        offset=mx.array([5, 0, 3]),
        max_seq_len=6,
    )
    mask = module.valid_tokens(metadata, block_size=4)
    assert mask.shape == (3, 1, 1, 8)
    assert mask.sum(axis=-1).flatten().tolist() == [6, 1, 4]
    assert mask[0, 0, 0].tolist() == [True] * 6 + [False] * 2
    assert module.valid_tokens(metadata, block_size=4) is mask
