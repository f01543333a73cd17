"""Requests that decode by forward pass: all as one, as many as memory holds, or one by one."""

import mlx.core as mx
import pytest

from vllm_metal.kv_cache.groups import AttentionGroup
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.segments import Kind, Segment

BLOCK = 16
GROUPS = [AttentionGroup(BLOCK, layers=(0,))]


@pytest.mark.parametrize(
    ("batched", "most_tokens", "most_rows", "parts"),
    [
        (True, 1 << 20, 8, [[0, 1, 2]]),
        (True, 48, 8, [[1], [0, 2]]),
        (True, 1 << 20, 2, [[1, 2], [0]]),
        (False, 1 << 20, 8, [[0], [1], [2]]),
    ],
)
def test_parts(batched, most_tokens, most_rows, parts):
    segments = [
        Segment("abc"[row], row, n - 1, 1, Kind.DECODE) for row, n in enumerate((10, 33, 12))
    ]
    decode = DecodeForward(
        lambda token_ids, _: mx.zeros((1, 1, 1)), batched, most_tokens, most_rows
    )
    assert [[s.row for s in part] for part in decode.parts(segments, GROUPS)] == parts
