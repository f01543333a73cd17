"""Segments as a forward pass and a sampler take them."""

from vllm_metal.runner.segments import Kind, Segment, in_row_order


def test_a_segment_counts_its_positions():
    decode = Segment("a", 3, 10, 3, Kind.DECODE, True, (5, 6))
    assert (decode.end, decode.num_samples, decode.num_rows) == (13, 3, 3)
    last = Segment("a", 3, 10, 7, Kind.CHUNK)
    assert (last.end, last.num_samples, last.num_rows) == (17, 1, 1)
    unfinished = last._replace(samples=False)
    assert (unfinished.num_samples, unfinished.num_rows) == (0, 1)


def test_those_of_equal_length_are_neighbours():
    lengths = {4: 1, 0: 3, 2: 1, 1: 3, 3: 2}
    segments = [Segment(str(r), r, 0, length, Kind.DECODE) for r, length in lengths.items()]
    assert [segment.row for segment in in_row_order(segments)] == [2, 4, 3, 0, 1]
