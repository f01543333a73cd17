"""Lengths of a forward pass, and index arrays that layers share."""

import mlx.core as mx
import pytest

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


def test_derived_arrays_are_made_once_for_all_layers():
    metadata, made = decode_metadata(), []

    def make() -> mx.array:
        made.append(None)
        return metadata.seq_lens + 1

    first = metadata.derived.once("rows", make)
    assert metadata.derived.once("rows", make) is first
    assert metadata.derived.once(("rows", 2), make) is not first
    assert len(made) == 2


def test_a_derived_none_is_kept_too():
    metadata = decode_metadata()
    assert metadata.derived.once("sinks", lambda: None) is None
    assert metadata.derived.once("sinks", lambda: pytest.fail("made twice")) is None


def test_forward_passes_share_nothing():
    first, second = decode_metadata(), decode_metadata()
    first.derived.once("rows", lambda: 1)
    assert second.derived.once("rows", lambda: 2) == 2
