"""Decode rows by forward pass: all as one, as many as memory holds, or one by one."""

import mlx.core as mx
import pytest

from tests.scheduler_outputs import new_request, scheduler_output
from vllm_metal.kv_cache.groups import AttentionGroup
from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.request_batch import RequestBatch

BLOCK = 16
GROUPS = [AttentionGroup(BLOCK, layers=(0,))]


@pytest.mark.parametrize(
    ("batched", "most_tokens", "parts"),
    [
        (True, 1 << 20, [[0, 1, 2]]),
        (True, 48, [[1], [2, 0]]),
        (False, 1 << 20, [[0], [1], [2]]),
    ],
)
def test_parts(make_config, batched, most_tokens, parts):
    batch = RequestBatch(make_config(), [BlockTableSize(BLOCK, 8)])
    prompts = {"a": range(10), "b": range(33), "c": range(12)}
    blocks = {"a": [1], "b": [2, 3, 4], "c": [5]}
    new = [
        new_request(name, prompt, blocks[name], num_computed_tokens=len(prompt) - 1)
        for name, prompt in prompts.items()
    ]
    batch.update(scheduler_output(new))
    decode = DecodeForward(lambda token_ids, _: mx.zeros((1, 1, 1)), batched, most_tokens)
    assert decode.parts(batch.rows, [0, 1, 2], GROUPS) == parts
