"""How the decode rows of a step run: as one forward pass, as several, or row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.groups import KVGroup
from vllm_metal.runner.forward_inputs import split_decode


@dataclass(frozen=True)
class DecodeForward:
    """The decode forward of one model, as the probes at start have found it to work."""

    run: Callable[[mx.array, Sequence[GroupMetadata]], mx.array]
    """Token ids [B, 1] and the metadata of each KV group to logits [B, 1, vocabulary]:
    `BoundModel.forward`, or `DecodeGraphs` where the model can be traced."""
    batched: bool
    """False where the model takes no array of offsets: rows run one by one."""
    most_tokens: int
    """Tokens that a forward pass may gather of a layer."""

    def parts(
        self, rows: InputBatch, decode_rows: list[int], groups: Sequence[KVGroup]
    ) -> list[list[int]]:
        """Rows of the batch by forward pass."""
        if not self.batched:
            return [[row] for row in decode_rows]
        return split_decode(rows, decode_rows, groups, self.most_tokens)
