"""Several new tokens of a request in one decode step, as where drafts are verified."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.attention.paged_layer import BLOCK, GROUPED, PagedLayer, error
from vllm_metal.attention.backend import LayerShape

NARROW_VALUES = LayerShape(num_kv_heads=1, head_size=64, head_size_v=32)
DRAFTED = (3, 3, 1, 3, 1)
"""New tokens of each request of a step in which drafts are verified; the last one has no others."""
NEW_TOKENS = [
    pytest.param(DRAFTED, id="unequal"),
    pytest.param((5,) * 5, id="equal", marks=pytest.mark.nightly),
    pytest.param((2, 4, 8, 8, 1), id="as many as there may be", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("query_lens", NEW_TOKENS)
@pytest.mark.parametrize("window", [None, 13])
def test_several_new_tokens_see_those_before_them_and_no_later_ones(candidate, window, query_lens):
    """Over block boundaries and with sinks; what an earlier, rejected draft left is overwritten."""
    shape = replace(GROUPED, sliding_window=window)
    layer = PagedLayer(candidate.make(shape, 8), num_blocks=40)
    requests = [layer.request(n, 4, sinks=True) for n in (45, 5, 30, 17, query_lens[-1])]
    requests = [replace(r, sinks=requests[0].sinks) for r in requests]
    lens = [request.seq_len for request in requests]
    for request, count in zip(requests, query_lens, strict=True):
        if request.seq_len > count:
            layer.prefill(request, 0, request.seq_len - count)
    layer.decode(
        [replace(r, keys=9 * r.keys, values=-r.values) for r in requests], query_lens=query_lens
    )
    out = layer.decode(requests, query_lens=query_lens)
    expected = np.concatenate(
        [
            r.expected(end - count, end).swapaxes(0, 1)
            for r, end, count in zip(requests, lens, query_lens, strict=True)
        ]
    )
    assert error(out, expected, *requests) < candidate.tolerance


@pytest.mark.parametrize("query_lens", NEW_TOKENS)
def test_several_new_tokens_are_rows_of_their_own_to_a_model_that_attends(candidate, query_lens):
    layer = PagedLayer(candidate.make(NARROW_VALUES, BLOCK))
    requests = [layer.request(n, 4) for n in (45, 5, 30, 17, query_lens[-1])]
    lens = [request.seq_len for request in requests]
    for request in requests:
        layer.prefill(request, 0, request.seq_len)
    metadata = layer.rows(requests, lens, query_lens=query_lens)
    new = [mx.zeros((sum(query_lens), 1, 1, size)) for size in (64, 32)]
    keys, _ = layer.backend.fetch(layer.pages, *new, metadata)
    of_row = [
        (r, count - 1 - i)
        for r, count in zip(requests, query_lens, strict=True)
        for i in range(count)
    ]
    assert keys.shape[0] == len(of_row) and keys.shape[2] == max(lens)
    for row, (request, later) in zip(np.array(keys), of_row, strict=True):
        seen = request.seq_len - later
        difference = np.abs(row[:, :seen] - request.keys[:, :seen]).max()
        assert difference < (candidate.tolerance + 1e-2) * np.abs(request.keys).max()
        assert not row[:, seen:].any()
