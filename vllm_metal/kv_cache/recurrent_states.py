"""Recurrent states in blocks of the KV cache: read before a forward pass, written after it.

A state is a few arrays of fixed size for each request. Its bytes lie in one block of the state's
group, array after array, as halfwords. A step may read a state in one block and write the new one
to another, so that the first remains for the prefix cache; no state is copied for that.

Letters: B requests.
"""

from collections.abc import Sequence
from math import prod

import mlx.core as mx

from vllm_metal.attention.metadata import GroupMetadata, StateMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import KVGroup, StateGroup
from vllm_metal.kv_cache.region_memory import RegionMemory, finish

StateArrays = list[mx.array | None]
"""The arrays [B, ...] of one state; None for one that the model never sets, or has not set yet."""


class RecurrentStates:
    """The states of all layers.

    Args:
        shapes: arrays of each state, in model order.
        groups: all groups of the cache.
        regions: the states that share each region, and its memory.
    """

    def __init__(
        self,
        shapes: Sequence[StateShape],
        groups: Sequence[KVGroup],
        regions: Sequence[tuple[tuple[int, ...], RegionMemory]],
    ):
        self._shapes = list(shapes)
        self._groups = [
            (index, group.states)
            for index, group in enumerate(groups)
            if isinstance(group, StateGroup)
        ]
        self._regions = list(regions)
        self._region_of = {state: region for states, region in regions for state in states}
        self._blocks: dict[int, mx.array] = {}
        """[B] int32, where the running forward pass writes each state."""
        self._old: dict[int, StateArrays] = {}
        self._new: dict[int, mx.array] = {}
        """[B, halfwords] of each state, to be written."""

    def __bool__(self) -> bool:
        return bool(self._shapes)

    def begin_forward(self, metadata: Sequence[GroupMetadata]) -> None:
        """Reads the states of a forward pass, given the metadata of its groups."""
        self._old.clear()
        self._new.clear()
        for group, states in self._groups:
            requests = metadata[group]
            assert isinstance(requests, StateMetadata)
            for state in states:
                self._blocks[state] = requests.write_ids
                if not requests.begins:
                    self._old[state] = self._read(state, requests.read_ids)
        if self._old:
            finish(self._old)  # so that nothing but its region holds an array

    def old(self, state: int) -> StateArrays:
        """The arrays of a state before this forward pass; all None where requests begin."""
        return list(self._old.get(state) or [None] * len(self._shapes[state].shapes))

    def keep(self, state: int, arrays: StateArrays) -> None:
        """Takes the arrays of a state after this forward pass."""
        halfwords = []
        for array, dtype in zip(arrays, self._shapes[state].dtypes, strict=True):
            if dtype is None:
                continue
            assert array is not None, "the model has not set an array of its state"
            halfwords.append(array.astype(dtype).reshape(array.shape[0], -1).view(mx.uint16))
        self._new[state] = mx.concatenate(halfwords, axis=1)

    @property
    def kept(self) -> list[mx.array]:
        """Everything that `write` needs, to evaluate before."""
        return list(self._new.values())

    def write(self) -> None:
        """Writes what was kept to its blocks, lazily: one write for each region."""
        for states, region in self._regions:
            if states[0] not in self._new:
                continue
            rows = [self._new[state] for state in states]
            width = max(row.shape[1] for row in rows)
            rows = [mx.pad(row, [(0, 0), (0, width - row.shape[1])]) for row in rows]
            blocks = mx.concatenate([self._blocks[state] for state in states])
            region.array[blocks, :width] = mx.concatenate(rows)
        self._new.clear()

    def copy(self, source: int, destination: int) -> None:
        """Copies all states of one block to another."""
        for _, region in self._regions:
            region.copy([source], [destination])
        finish([region.array for _, region in self._regions])

    def _read(self, state: int, block_ids: mx.array) -> StateArrays:
        rows = self._region_of[state].array[block_ids]
        arrays: StateArrays = []
        begin, shape = 0, self._shapes[state]
        for size, dtype in zip(shape.shapes, shape.dtypes, strict=True):
            if size is None or dtype is None:
                arrays.append(None)
                continue
            end = begin + prod(size) * dtype.size // 2
            array = mx.contiguous(rows[:, begin:end]).view(dtype)
            arrays.append(array.reshape(-1, *size))
            begin = end
        return arrays
