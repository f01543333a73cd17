"""How the requests that decode in a step run: as one forward pass, as several, or one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.groups import KVGroup
from vllm_metal.runner.forward_inputs import split_decode
from vllm_metal.runner.segments import Segment, in_row_order


@dataclass(frozen=True)
class DecodeForward:
    """The decode forward of one model, as the probes at start have found it to work."""

    run: Callable[[mx.array, Sequence[GroupMetadata]], mx.array]
    """Token ids [T, 1] and the metadata of each KV group to logits [T, 1, vocabulary]:
    `BoundModel.forward`, or `DecodeGraphs` where the model can be traced."""
    batched: bool
    """False where the model takes no array of offsets: requests run one by one."""
    most_tokens: int
    """Tokens that a forward pass may gather of a layer."""
    most_rows: int
    """Rows that it may have."""

    def parts(self, segments: Sequence[Segment], groups: Sequence[KVGroup]) -> list[list[Segment]]:
        """Segments by forward pass, in the order of its rows."""
        if not self.batched:
            return [[segment] for segment in in_row_order(segments)]
        return split_decode(segments, groups, self.most_tokens, self.most_rows)
