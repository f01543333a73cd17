"""The sole owner of every layer's pages.

Pages are written in place because nobody but this object holds them: `store` hands the array to
the backend, drops it, and keeps what comes back. On MLX's CPU stream a write is in place only
when its array has no other holder at the moment it is dispatched, so a forward pass is evaluated
before the next one is dispatched (`ModelRunner`). Where layers share a region of memory
(`CacheLayout`), what came before a second write to it is evaluated first, and the recurrent states
are read before the forward pass and written after it.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Pages
from vllm_metal.attention.metadata import AttentionMetadata, GroupMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import CacheLayout


class TakenArrays(NamedTuple):
    """Everything that `KVCache.take` hands over; a tree of arrays for `mx.compile`."""

    regions: list[mx.array]
    """The array of each region."""
    tokens: list[mx.array | None]
    """The `Pages.token` of each layer."""


_TAKEN = mx.array(())
"""Stands in a region whose array was taken: whoever reads it meanwhile fails by its shape."""


class _Region:
    """The array of one region, and who wrote to it in this forward pass."""

    def __init__(self, num_blocks: int, page_bytes: int, dtypes: set[mx.Dtype]):
        dtype = dtypes.pop() if len(dtypes) == 1 else mx.uint16
        self.array = mx.zeros((num_blocks, page_bytes // dtype.size), dtype)
        self.writer: int | None = None

    def view(self, dtype: mx.Dtype) -> mx.array:
        """The same bytes as elements of `dtype`."""
        return self.array if dtype == self.array.dtype else self.array.view(dtype)

    def replace(self, array: mx.array) -> None:
        """Takes what a write made of `view`."""
        dtype = self.array.dtype
        self.array = array if array.dtype == dtype else array.view(dtype)


class KVCache:
    """Pages of all layers, and recurrent states.

    Args:
        backends: one for each attention layer, in model order.
        num_blocks: blocks of each layer; block 0 is vLLM's null block.
        states: shapes of the recurrent states, in model order.
        layout: where each layer's bytes are; by default each has its own.
    """

    def __init__(
        self,
        backends: Sequence[AttentionBackend],
        num_blocks: int,
        states: Sequence[StateShape] = (),
        layout: CacheLayout | None = None,
    ):
        self.backends = list(backends)
        self.states = list(states)
        self.num_blocks = num_blocks
        layout = layout or CacheLayout.separate(self.backends, self.states, num_blocks)
        self.groups = layout.groups
        self.group_of_layer = {i: g for g, group in enumerate(self.groups) for i in group.layers}
        self.group_of_state = {i: g for g, group in enumerate(self.groups) for i in group.states}
        self._regions: list[_Region] = []
        self._region_of_layer: dict[int, _Region] = {}
        self._region_of_state: dict[int, _Region] = {}
        self._states_of_region: dict[_Region, tuple[int, ...]] = {}
        for planned in layout.regions:
            dtypes = {self.backends[layer].page_dtype for layer in planned.layers}
            dtypes |= {mx.uint16} if planned.states else set()
            region = _Region(num_blocks, planned.page_bytes, dtypes)
            self._regions.append(region)
            self._region_of_layer |= dict.fromkeys(planned.layers, region)
            self._region_of_state |= dict.fromkeys(planned.states, region)
            if planned.states:
                self._states_of_region[region] = planned.states
        self._tokens = [backend.first_token() for backend in self.backends]
        """`Pages.token` of each layer."""
        self._blocks_of_state: dict[int, mx.array] = {}
        self._old_states: dict[int, list[mx.array | None]] = {}
        self._new_states: dict[int, mx.array] = {}
        self.shares_arrays = bool(self.states) or any(
            len(planned.layers) > 1 and not self._all_store_through(planned.layers)
            for planned in layout.regions
        )
        """Whether a forward pass writes an array more than once, and so evaluates on its way."""
        _finish(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array that a forward pass leaves behind, to evaluate. Do not keep the list."""
        tokens = [token for token in self._tokens if token is not None]
        return [region.array for region in self._regions] + tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the pages really occupy."""
        return sum(region.array.nbytes for region in self._regions)

    def begin_forward(self, metadata: Sequence[GroupMetadata]) -> None:
        """Reads the recurrent states of a forward pass, given what its groups are told."""
        for region in self._regions:
            region.writer = None
        self._old_states.clear()
        self._new_states.clear()
        for state, group in self.group_of_state.items():
            self._blocks_of_state[state] = metadata[group].block_ids
            if not metadata[group].begins:
                self._old_states[state] = self._read_state(state, metadata[group].block_ids)
        if self._old_states:
            _finish(self._old_states)  # so that nothing but its region holds an array

    def evaluate(self, *outputs: mx.array) -> None:
        """Ends a forward pass: evaluates `outputs` and all that was written, and keeps states."""
        new_states = list(self._new_states.values())
        _finish(outputs, self.arrays, new_states)
        for region, states in self._states_of_region.items():
            if states[0] in self._new_states:
                self._write_states(region, states)
        self._new_states.clear()
        _finish(self.arrays)

    def pages(self, layer: int) -> Pages:
        """Pages of one layer, for reading within the current forward pass."""
        array = self._region_of_layer[layer].view(self.backends[layer].page_dtype)
        return Pages(array, self._tokens[layer])

    def take(self) -> TakenArrays:
        """Hands all arrays over to a caller that will `put` them, or their successors, back."""
        taken = TakenArrays([region.array for region in self._regions], self._tokens)
        for region in self._regions:
            region.array = _TAKEN
        self._tokens = []
        return taken

    def put(self, taken: TakenArrays) -> None:
        """The reverse of `take`."""
        for region, array in zip(self._regions, taken.regions, strict=True):
            region.array = array
        self._tokens = taken.tokens

    def store(
        self, layer: int, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> None:
        """Writes keys [T, H, Dk] and values [T, H, Dv] to the slots of `metadata`."""
        backend, region = self.backends[layer], self._region_of_layer[layer]
        if not backend.stores_through:
            if region.writer not in (None, layer):
                _finish(keys, values, self.arrays)  # all that read or wrote the array before
        region.writer = layer
        pages = self.pages(layer)
        stored = backend.store(pages, keys, values, metadata)
        if stored.array is not pages.array:
            region.replace(stored.array)
        self._tokens[layer] = stored.token

    def old_state(self, state: int) -> list[mx.array | None] | None:
        """The arrays [B, ...] of a state before this forward pass; None where requests begin."""
        return self._old_states.get(state)

    def keep_state(self, state: int, arrays: Sequence[mx.array | None]) -> None:
        """Takes the arrays [B, ...] of a state after this forward pass."""
        halfwords = [
            array.astype(dtype).reshape(array.shape[0], -1).view(mx.uint16)
            for array, dtype in zip(arrays, self.states[state].dtypes, strict=True)
            if dtype is not None
        ]
        self._new_states[state] = mx.concatenate(halfwords, axis=1)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) of every region."""
        source = mx.array([src for src, _ in copies])
        destination = mx.array([dst for _, dst in copies])
        self._copy(self._regions, source, destination)

    def copy_states(self, source: int, destination: int) -> None:
        """Copies one block of the regions that hold recurrent states."""
        self._copy(list(self._states_of_region), mx.array([source]), mx.array([destination]))

    def _copy(self, regions: list[_Region], source: mx.array, destination: mx.array) -> None:
        for region in regions:
            blocks = region.array[source]
            _finish(blocks)  # read before the write, or MLX copies the whole array
            region.array[destination] = blocks
        _finish(self.arrays)

    def _all_store_through(self, layers: Sequence[int]) -> bool:
        return all(self.backends[layer].stores_through for layer in layers)

    def _read_state(self, state: int, block_ids: mx.array) -> list[mx.array | None]:
        rows = self._region_of_state[state].array[block_ids]
        arrays: list[mx.array | None] = []
        begin, shape = 0, self.states[state]
        for size, dtype in zip(shape.shapes, shape.dtypes, strict=True):
            if size is None:
                arrays.append(None)
                continue
            end = begin + prod(size) * dtype.size // 2
            array = mx.contiguous(rows[:, begin:end]).view(dtype)
            arrays.append(array.reshape(-1, *size))
            begin = end
        return arrays

    def _write_states(self, region: _Region, states: Sequence[int]) -> None:
        """One write for all states of a region, each to the blocks of its own group."""
        rows = [self._new_states[state] for state in states]
        width = max(row.shape[1] for row in rows)
        rows = [mx.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows]
        blocks = [self._blocks_of_state[state] for state in states]
        region.array[mx.concatenate(blocks), :width] = mx.concatenate(rows)


def _finish(*arrays) -> None:
    """Evaluates, and waits until MLX lets go of what was read.

    On a GPU it may hold buffers a moment longer than it takes for a result to be there, and would
    copy pages that it could write in place.
    """
    mx.eval(*arrays)
    mx.synchronize()
