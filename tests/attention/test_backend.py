"""What a backend is: the same contract for every candidate, against the float32 oracle."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs
from tests.attention.candidates import Candidate
from tests.attention.paged_layer import BLOCK, GROUPED, PagedLayer, error, fill
from vllm_metal.attention.backend import LayerShape
from vllm_metal.kv_cache.cache import KVCache

LENGTHS = tuple(inputs.lengths(BLOCK))
NARROW_VALUES = LayerShape(num_kv_heads=1, head_size=64, head_size_v=32)
ONE_TO_ONE = LayerShape(num_kv_heads=3, head_size=32, head_size_v=32)
SHAPES = [GROUPED, NARROW_VALUES, ONE_TO_ONE]


def layer_of(candidate: Candidate, shape: LayerShape = GROUPED) -> PagedLayer:
    return PagedLayer(candidate.make(shape, BLOCK))


def test_pages_take_the_bytes_that_the_backend_says(candidate):
    for shape in SHAPES:
        backend = candidate.make(shape, BLOCK)
        assert KVCache([backend], 7).nbytes == 7 * backend.page_size_bytes
        assert backend.page_size_bytes == BLOCK * shape.num_kv_heads * backend.slot_size


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "narrow values", "one to one"])
def test_decode_of_unequal_lengths(candidate, shape):
    for group in (1, 3):
        layer = layer_of(candidate, shape)
        requests = [layer.request(n, group * shape.num_kv_heads) for n in LENGTHS]
        for request in requests:
            fill(layer, request)
        out = layer.decode(requests)
        expected = layer.expected_decode(requests)
        assert error(out, expected, *requests) < candidate.tolerance, group


def test_decode_step_after_step_over_a_block_boundary(candidate):
    """Each token is written by one step and read by the following ones."""
    layer = layer_of(candidate)
    requests = [layer.request(2 * BLOCK + 3, 4), layer.request(BLOCK + 2, 4)]
    for request in requests:
        layer.prefill(request, 0, BLOCK - 2)
    for step in range(BLOCK - 1, BLOCK + 3):
        lens = [step, step]
        out = layer.decode(requests, lens=lens)
        assert error(out, layer.expected_decode(requests, lens), *requests) < candidate.tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=["grouped", "narrow values", "one to one"])
def test_prefill_without_context(candidate, shape):
    layer = layer_of(candidate, shape)
    for seq_len in (*LENGTHS, 150):
        request = layer.request(seq_len, 3 * shape.num_kv_heads)
        out = layer.prefill(request, 0, seq_len)
        assert error(out, request.expected(0, seq_len), request) < candidate.tolerance, seq_len


def test_prefill_over_context(candidate):
    """Chunks that end inside a block, on its edge, and after it."""
    layer = layer_of(candidate)
    for chunk in (1, 7, BLOCK, 2 * BLOCK + 1):
        request = layer.request(3 * BLOCK + 5, 4)
        for start in range(0, request.seq_len, chunk):
            end = min(start + chunk, request.seq_len)
            out = layer.prefill(request, start, end)
            assert error(out, request.expected(start, end), request) < candidate.tolerance, chunk


def test_a_batch_gives_what_its_requests_give_alone(candidate):
    layer = layer_of(candidate)
    requests = [layer.request(n, 4) for n in LENGTHS]
    for request in requests:
        fill(layer, request)
    together = layer.decode(requests)
    alone = mx.concatenate([layer.decode([request]) for request in requests])
    assert mx.abs(together - alone).max().item() < candidate.rounding


def test_requests_do_not_touch_each_other(candidate):
    """Writing a second request leaves the answer to the first one bit for bit the same."""
    layer = layer_of(candidate)
    first, second = layer.request(3 * BLOCK + 5, 4), layer.request(3 * BLOCK + 9, 4)
    fill(layer, first)
    before = layer.decode([first])
    fill(layer, second)
    layer.decode([second])
    assert mx.array_equal(layer.decode([first]), before)


def test_the_rest_of_the_last_block_is_masked(candidate):
    """What an earlier owner left behind in a block does not count, in decode nor in prefill."""
    layer = layer_of(candidate)
    earlier = layer.request(2 * BLOCK, 4)
    earlier = replace(earlier, keys=10 * earlier.keys, values=100 + earlier.values)
    for seq_len in (1, BLOCK - 1, BLOCK + 1):
        layer.prefill(earlier, 0, 2 * BLOCK)
        request = layer.request(seq_len, 4, block_ids=earlier.block_ids)
        fill(layer, request, chunk=5)
        out = layer.decode([request])
        assert error(out, layer.expected_decode([request]), request) < candidate.tolerance, seq_len
        out = layer.prefill(request, seq_len - 1, seq_len)
        expected = request.expected(seq_len - 1, seq_len)
        assert error(out, expected, request) < candidate.tolerance, seq_len


def test_padding_of_the_block_table_is_masked(candidate):
    """Unused entries may name any block, also one of another request."""
    layer = layer_of(candidate)
    short, long = layer.request(3, 4), layer.request(4 * BLOCK, 4)
    long = replace(long, values=100 + long.values)
    for request in (short, long):
        fill(layer, request)
    out = layer.decode([short, long], padding=long.block_ids[0])
    assert error(out[:1], layer.expected_decode([short]), short) < candidate.tolerance
    assert error(out[1:], layer.expected_decode([long]), long) < candidate.tolerance


def test_sinks(candidate):
    layer = layer_of(candidate)
    request = layer.request(2 * BLOCK + 5, 4, sinks=True)
    for start, end in ((0, BLOCK + 3), (BLOCK + 3, request.seq_len - 1)):
        out = layer.prefill(request, start, end)
        assert error(out, request.expected(start, end), request) < candidate.tolerance
    out = layer.decode([request])
    assert error(out, layer.expected_decode([request]), request) < candidate.tolerance


def test_the_scale_is_the_models(candidate):
    layer = layer_of(candidate)
    request = replace(layer.request(BLOCK + 5, 4), scale=0.5)
    fill(layer, request, chunk=9)
    out = layer.decode([request])
    assert error(out, layer.expected_decode([request]), request) < 4 * candidate.tolerance


def test_output_has_the_type_of_the_queries(candidate):
    layer = layer_of(candidate)
    for dtype, rounding in ((mx.float16, 2e-3), (mx.bfloat16, 2e-2)):
        request = layer.request(BLOCK + 5, 4, sinks=True)
        largest = candidate.tolerance + rounding
        for start, end in ((0, 10), (10, BLOCK + 4)):
            out = layer.prefill(request, start, end, dtype)
            assert out.dtype == dtype
            assert error(out, request.expected(start, end), request) < largest
        out = layer.decode([request], dtype)
        assert out.dtype == dtype
        assert error(out, layer.expected_decode([request]), request) < largest


def test_keys_and_values_may_have_types_of_their_own(candidate):
    """The output has that of the queries, whatever a chunk reads."""
    layer = layer_of(candidate)
    request = layer.request(BLOCK + 5, 4)
    kinds = mx.float32, mx.float16, mx.bfloat16
    for queries, keys, values in zip(
        kinds, kinds[1:] + kinds[:1], kinds[2:] + kinds[:2], strict=True
    ):
        dtypes = {"queries": queries, "keys": keys, "values": values}
        for start, end in ((0, 10), (10, BLOCK + 4)):
            out = layer.prefill(request, start, end, dtypes)
            assert out.dtype == queries
            expected = request.expected(start, end)
            assert error(out, expected, request) < candidate.tolerance + 2e-2
        out = layer.decode([request], dtypes)
        assert out.dtype == queries
        assert error(out, layer.expected_decode([request]), request) < candidate.tolerance + 2e-2


@pytest.mark.parametrize("field", ["keys", "values"])
def test_ugly_keys_and_values(candidate, field):
    """Each case scaled so that its scores are of the size of a model's."""
    for case in inputs.vectors(1):
        layer = layer_of(candidate)
        request = layer.request(2 * BLOCK + 5, 4)
        ugly = inputs.vectors(64, count=2 * request.seq_len)[case].reshape(2, request.seq_len, 64)
        request = replace(request, **{field: ugly})
        scores = request.queries.reshape(2, 2, -1, 64) @ request.keys[:, None].swapaxes(2, 3)
        request = replace(request, scale=float(4 / (np.abs(scores).max() or 4.0)))
        fill(layer, request)
        out = layer.decode([request])
        assert error(out, layer.expected_decode([request]), request) < candidate.tolerance, case


def test_sharp_attention_is_finite(candidate):
    """Scores in the hundreds: rounding may pick another token, but nothing overflows."""
    layer = layer_of(candidate)
    for magnitude in (30.0, 1000.0):
        request = layer.request(2 * BLOCK + 5, 4)
        request = replace(request, keys=magnitude * request.keys)
        fill(layer, request)
        out = np.array(layer.decode([request]))
        assert np.isfinite(out).all()
        assert np.abs(out).max() <= 1.01 * np.abs(request.values).max()


def test_a_window_is_seen_and_no_more(candidate):
    """Chunks shorter and longer than the window, then rows of unequal lengths; with sinks."""
    for window in (1, 8, 13, 40):
        shape = replace(GROUPED, sliding_window=window)
        layer = PagedLayer(candidate.make(shape, 8), num_blocks=40)
        requests = [layer.request(n, 4, sinks=True) for n in (61, 5, 30)]
        requests = [replace(r, sinks=requests[0].sinks) for r in requests]
        for request, chunk in zip(requests, (25, 3, 7), strict=True):
            for start in range(0, request.seq_len - 1, chunk):
                end = min(start + chunk, request.seq_len - 1)
                out = layer.prefill(request, start, end)
                expected = request.expected(start, end)
                assert error(out, expected, request) < candidate.tolerance, window
        out = layer.decode(requests)
        expected = layer.expected_decode(requests)
        assert error(out, expected, *requests) < candidate.tolerance, window
        alone = mx.concatenate([layer.decode([request]) for request in requests])
        assert mx.abs(out - alone).max().item() < candidate.rounding, window


def test_a_chunk_fetches_its_context_and_itself_as_it_is(candidate):
    layer = layer_of(candidate, NARROW_VALUES)
    request = layer.request(2 * BLOCK + 5, 4)
    for start, end in ((0, BLOCK + 3), (BLOCK + 3, request.seq_len)):
        layer.prefill(request, start, end)
        own = [mx.array(part[None, :, start:end]) for part in (request.keys, request.values)]
        fetched = layer.backend.fetch(layer.pages, *own, layer.chunk(request, start, end))
        for part, new, whole in zip(fetched, own, (request.keys, request.values), strict=True):
            assert part.shape[2] == end and part.dtype == new.dtype
            assert mx.array_equal(part[:, :, start:], new)
            difference = np.abs(np.array(part[0]) - whole[:, :end]).max()
            assert difference < candidate.tolerance * np.abs(whole).max()


def test_decode_rows_fetch_their_tokens_and_zeros(candidate):
    """Also where an earlier owner of the blocks left what is no number."""
    layer = layer_of(candidate, NARROW_VALUES)
    earlier = layer.request(4 * BLOCK, 4)
    layer.prefill(replace(earlier, keys=np.full_like(earlier.keys, np.nan)), 0, 4 * BLOCK)
    owned = earlier.block_ids
    requests = [layer.request(BLOCK + 3, 4, block_ids=owned[:2]), layer.request(3 * BLOCK, 4)]
    for request in requests:
        fill(layer, request)
    layer.decode(requests)
    lens = [request.seq_len for request in requests]
    for dtype in (mx.float32, mx.bfloat16):
        new = [mx.zeros((2, 1, 1, size), dtype) for size in (64, 32)]
        fetched = layer.backend.fetch(layer.pages, *new, layer.rows(requests, lens, owned[-1]))
        for row, request in enumerate(requests):
            for part, whole in zip(fetched, (request.keys, request.values), strict=True):
                assert part.shape[2] == max(lens) and part.dtype == dtype
                numbers = np.array(part[row].astype(mx.float32))
                difference = np.abs(numbers[:, : request.seq_len] - whole).max()
                assert difference < (candidate.tolerance + 1e-2) * np.abs(whole).max()
                assert not numbers[:, request.seq_len :].any()


def test_a_large_chunk_in_a_window_or_where_the_model_computes_attention(candidate):
    fetched = candidate.make(replace(GROUPED, fetched=True), BLOCK).chunk_memory(2000, 9**6, 4)
    assert (fetched.tokens, fetched.scored_rows) == (9**6, 2000)
    backend = candidate.make(replace(GROUPED, sliding_window=50), BLOCK)
    assert backend.chunk_memory(7, 9**6, 4).tokens == 50 + 7 - 1 + BLOCK - 1
