"""Decode steps that are traced once and replayed, instead of run in Python each time.

A decode step of B requests with N blocks each has the same thousands of operations every time.
`mx.compile` records them for one (B, N) and replays them with other arrays, which takes a fraction
of the time that the model's Python code takes, and fuses what is element-wise. The pages go in and
come out: they have no other holder, so MLX still writes them in place. Where drafts are verified,
the number of new tokens of each request belongs to the shape.

N is rounded up, so that a growing request keeps its graph for a while. A shape is traced when it
comes a second time; the traces of the last `MAX_GRAPHS` shapes are kept.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from vllm_metal.attention.metadata import DecodeMetadata, GroupMetadata
from vllm_metal.kv_cache.cache import TakenArrays
from vllm_metal.kv_cache.groups import AttentionGroup, rounded_blocks
from vllm_metal.model.model_binding import BoundModel

MAX_GRAPHS = 64
"""A trace takes about 1 KiB for each operation."""

MOVES_ELEMENTS = frozenset(
    "AsStrided Broadcast Concatenate Contiguous Copy Depends ExpandDims Flatten Full Gather "
    "GatherAxis Pad Reshape Slice SliceUpdate Split Squeeze StopGradient Transpose Unflatten "
    "View".split()
)
"""Operations of MLX that compute nothing; without elements, their kernels are not launched."""

_Graph = Callable[..., tuple[mx.array, TakenArrays]]

_Shapes = tuple[tuple[int, ...], ...]
"""The new tokens of each request, and the shape of each group's block table."""


class DecodeGraphs:
    """The decode forward of a bound model, with its traces.

    Args:
        model: takes an array of offsets, and writes each array of its pages once in a forward.
    """

    def __init__(self, model: BoundModel):
        self._model = model
        self._kv_cache = model.kv_cache
        self._block_sizes = [
            group.block_size for group in model.kv_cache.groups if isinstance(group, AttentionGroup)
        ]
        self._graphs: OrderedDict[_Shapes, _Graph] = OrderedDict()

    def __call__(
        self,
        token_ids: mx.array,  # [T, 1]
        metadata: Sequence[GroupMetadata],
    ) -> mx.array:  # [T, 1, vocabulary]
        """As `BoundModel.forward`, of a decode step."""
        query_lens = _query_lens(metadata)
        token_ids, offset, tables, seq_lens, slots = _inputs(token_ids, metadata)
        graph = self._graph_of((query_lens, *(table.shape for table in tables)))
        pages = self._kv_cache.take()
        try:
            logits, pages = graph(token_ids, offset, tables, seq_lens, slots, pages)
        finally:
            self._kv_cache.put(pages)
        return logits

    def empty_operations(self, token_ids: mx.array, metadata: Sequence[GroupMetadata]) -> list[str]:
        """Names of the step's operations that compute arrays without elements.

        The step is traced and not run. Operations that only move elements are not named.

        MLX's GPU backends launch what `mx.compile` has fused without asking whether there is
        anything to compute. CUDA's divides by the number of elements, which ends the process
        (MLX 0.32, `Compiled::eval_gpu` and `get_launch_args`).
        """
        query_lens = _query_lens(metadata)
        token_ids, offset, *lists = _inputs(token_ids, metadata)
        pages, count = self._kv_cache.take(), len(self._block_sizes)
        found: list[str] = []

        def note(part: dict[str, Any]) -> None:
            if part["type"] == "primitive" and part["name"] not in MOVES_ELEMENTS:
                found.extend(part["name"] for _, shape, _ in part["outputs"] if 0 in shape)

        def step(token_ids: mx.array, offset: mx.array, *rest: mx.array) -> list[mx.array]:
            tables, seq_lens, slots = (list(rest[i * count :][:count]) for i in range(3))
            given = TakenArrays(list(rest[3 * count :]), pages.tokens)
            arguments = token_ids, offset, tables, seq_lens, slots, given
            logits, after = self._step(query_lens, *arguments)
            return [logits, *after.regions]

        try:
            arrays = itertools.chain(*lists, pages.regions)
            mx.export_function(note, step, token_ids, offset, *arrays)
        finally:
            self._kv_cache.put(pages)
        return found

    def _graph_of(self, shapes: _Shapes) -> _Graph:
        """The step itself for shapes never seen, its trace from then on."""
        if shapes not in self._graphs:
            step = partial(self._step, shapes[0])
            self._graphs[shapes] = mx.compile(step)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return step
        self._graphs.move_to_end(shapes)
        return self._graphs[shapes]

    def _step(
        self,
        query_lens: tuple[int, ...],
        token_ids: mx.array,
        offset: mx.array,
        tables: list[mx.array],
        seq_lens: list[mx.array],
        slots: list[mx.array],
        pages: TakenArrays,
    ) -> tuple[mx.array, TakenArrays]:
        metadata = [
            DecodeMetadata(
                block_table=table,
                seq_lens=lens,
                slot_mapping=slot_mapping,
                offset=offset,
                max_seq_len=table.shape[1] * block_size,
                query_lens=query_lens,
            )
            for block_size, table, lens, slot_mapping in zip(
                self._block_sizes, tables, seq_lens, slots, strict=True
            )
        ]
        self._kv_cache.put(pages)
        logits = self._model.forward(token_ids, metadata)
        return logits, self._kv_cache.take()


def _query_lens(metadata: Sequence[GroupMetadata]) -> tuple[int, ...]:
    return next(told.query_lens for told in metadata if isinstance(told, DecodeMetadata))


def _inputs(
    token_ids: mx.array, metadata: Sequence[GroupMetadata]
) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array], list[mx.array]]:
    """What a graph is given beside the pages."""
    groups = [told for told in metadata if isinstance(told, DecodeMetadata)]
    tables = [_pad(told.block_table, rounded_blocks(told.block_table.shape[1])) for told in groups]
    seq_lens = [told.seq_lens for told in groups]
    slots = [told.slot_mapping for told in groups]
    return token_ids, mx.array(groups[0].offset).reshape(-1), tables, seq_lens, slots


def _pad(block_table: mx.array, num_blocks: int) -> mx.array:
    """Fills the table up with block 0, whose tokens no request sees."""
    if block_table.shape[1] == num_blocks:
        return block_table
    return mx.pad(block_table, [(0, 0), (0, num_blocks - block_table.shape[1])])
