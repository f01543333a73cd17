"""Lengths of a forward pass, and index arrays that layers share."""

from dataclasses import replace

import mlx.core as mx

from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata


def decode_metadata() -> DecodeMetadata:
    return DecodeMetadata(
        block_table=mx.array([[1, 2], [3, 0], [4, 0]]),
        seq_lens=mx.array([17, 1, 16]),
        slot_mapping=mx.array([32, 48, 79]),
        offset=mx.array([16, 0, 15]),
        max_seq_len=17,
    )


def test_lengths_of_a_prefill_chunk():
    metadata = PrefillMetadata(mx.array([[1, 2]]), mx.arange(16, 21), context_len=12, query_len=5)
    assert metadata.seq_len == metadata.max_seq_len == 17
    assert metadata.offset == 12


def test_rows_of_a_decode_step_may_be_unequal():
    assert decode_metadata().is_ragged
    assert not DecodeMetadata(mx.array([[1]]), mx.array([3]), mx.array([18]), 2, 3).is_ragged


def test_requests_with_equally_many_new_tokens_are_a_part():
    metadata = DecodeMetadata(
        block_table=mx.array([[1, 2], [3, 0], [4, 0]]),
        seq_lens=mx.array([17, 3, 16]),
        slot_mapping=mx.array([32, 49, 50, 78, 79]),
        offset=mx.array([16, 1, 2, 14, 15]),
        max_seq_len=17,
        query_lens=(1, 2, 2),
    )
    first, second = metadata.parts
    assert metadata.parts[0] is first
    assert (first.query_len, second.query_len) == (1, 2)
    assert (first.seq_lens.tolist(), second.seq_lens.tolist()) == ([17], [3, 16])
    assert second.block_table.tolist() == [[3, 0], [4, 0]]
    assert second.slot_mapping.tolist() == [49, 50, 78, 79]
    assert second.offset.tolist() == [1, 2, 14, 15]
    rows = metadata.rows
    assert rows.seq_lens.tolist() == [17, 2, 3, 15, 16]
    assert rows.block_table.tolist() == [[1, 2], [3, 0], [3, 0], [4, 0], [4, 0]]
    assert (rows.query_len, rows.parts) == (1, (rows,))


def test_one_new_token_each_is_one_part():
    metadata = decode_metadata()
    assert metadata.parts == (metadata,) and metadata.rows is metadata


def later(metadata: DecodeMetadata, steps: int, made: "Made") -> mx.array:
    made.times += 1
    return metadata.seq_lens + steps


class Made:
    """Counts how often an array is computed."""

    times = 0


def test_derived_arrays_are_made_once_for_all_layers():
    metadata, made = decode_metadata(), Made()
    first = metadata.once(later, 1, made)
    assert metadata.once(later, 1, made) is first
    assert metadata.once(later, 2, made).tolist() == [19, 3, 18]
    assert made.times == 2


def test_a_derived_none_is_kept_too():
    metadata, made = decode_metadata(), Made()

    assert metadata.once(nothing, made) is None
    assert metadata.once(nothing, made) is None
    assert made.times == 1


def nothing(metadata: DecodeMetadata, made: Made) -> None:
    made.times += 1


def test_forward_passes_share_nothing():
    """Nor does metadata that is made from other metadata."""
    first, second, made = decode_metadata(), decode_metadata(), Made()
    for metadata in (first, second, replace(first, seq_lens=mx.array([1, 2, 3]))):
        metadata.once(later, 1, made)
    assert made.times == 3
