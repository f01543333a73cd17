"""The sole owner of every layer's pages.

Pages that MLX writes are written in place because nobody but this object holds them: `store` hands
the array to the backend, drops it, and keeps what comes back. Such a write is in place only when
its array has no other holder at the moment it is dispatched, so a forward pass is evaluated before
the next one is dispatched (`ModelRunner`). Where layers share a region of memory (`CacheLayout`),
what came before a second write to it is evaluated first, and the recurrent states are read before
the forward pass and written after it.

Kernels write through the array that they are given, whoever else holds it. If they write all pages
(`KVCache.stores_through`), a step may be dispatched while the one before runs; why that is in order
is argued in `vllm_metal/runner/steps_in_flight.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, Pages
from vllm_metal.attention.metadata import AttentionMetadata, GroupMetadata, StateMetadata
from vllm_metal.attention.state_shape import StateShape
from vllm_metal.kv_cache.groups import AttentionGroup, CacheLayout
from vllm_metal.kv_cache.recurrent_states import RecurrentStates
from vllm_metal.kv_cache.region_memory import RegionMemory, finish


class TakenArrays(NamedTuple):
    """Everything that `KVCache.take` hands over; a tree of arrays for `mx.compile`."""

    regions: list[mx.array]
    """The array of each region."""
    tokens: list[mx.array | None]
    """The `Pages.token` of each layer."""


_TAKEN = mx.array(())
"""Placeholder in a region whose array was taken: a read meanwhile fails because of its shape."""


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
        self.num_blocks = num_blocks
        layout = layout or CacheLayout.separate(self.backends, states)
        self.groups = layout.groups
        self._group_of_layer = {
            layer: index
            for index, group in enumerate(self.groups)
            if isinstance(group, AttentionGroup)
            for layer in group.layers
        }
        self._regions: list[RegionMemory] = []
        self._region_of_layer: dict[int, RegionMemory] = {}
        regions_of_states = []
        for planned in layout.regions:
            dtypes = {self.backends[layer].page_dtype for layer in planned.layers}
            dtypes |= {mx.uint16} if planned.states else set()
            region = RegionMemory(num_blocks, planned.page_bytes, dtypes)
            self._regions.append(region)
            self._region_of_layer |= dict.fromkeys(planned.layers, region)
            if planned.states:
                regions_of_states.append((planned.states, region))
        self.states = RecurrentStates(states, self.groups, regions_of_states)
        self.stores_through = not states and self._all_store_through(range(len(self.backends)))
        """Whether kernels write all pages, in place, however many holders an array has."""
        self._tokens = [backend.first_token() for backend in self.backends]
        """`Pages.token` of each layer."""
        self.shares_arrays = bool(self.states) or any(
            len(planned.layers) > 1 and not self._all_store_through(planned.layers)
            for planned in layout.regions
        )
        """Whether a forward pass writes an array more than once, and so evaluates on its way."""
        finish(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array that a forward pass leaves behind, to evaluate. Do not keep the list."""
        tokens = [token for token in self._tokens if token is not None]
        return [region.array for region in self._regions] + tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the pages really occupy."""
        return sum(region.array.nbytes for region in self._regions)

    def metadata_of(self, layer: int, groups: Sequence[GroupMetadata]) -> AttentionMetadata:
        """The metadata of one layer, given that of the groups."""
        metadata = groups[self._group_of_layer[layer]]
        assert not isinstance(metadata, StateMetadata)
        return metadata

    def begin_forward(self, groups: Sequence[GroupMetadata]) -> None:
        """Reads the recurrent states of a forward pass, given the metadata of its groups."""
        for region in self._regions:
            region.writer = None
        self.states.begin_forward(groups)

    def evaluate(self, *outputs: mx.array) -> None:
        """Ends a forward pass: evaluates `outputs` and all that was written, and keeps states."""
        finish(outputs, self.arrays, self.states.kept)
        if self.states:
            self.states.write()
            finish(self.arrays)

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
                finish(keys, values, self.arrays)  # all that read or wrote the array before
        region.writer = layer
        pages = self.pages(layer)
        stored = backend.store(pages, keys, values, metadata)
        if stored.array is not pages.array:
            region.replace(stored.array)
        self._tokens[layer] = stored.token

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) of every region."""
        sources, destinations = map(list, zip(*copies, strict=True))
        for region in self._regions:
            region.copy(sources, destinations)
        finish(self.arrays)

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of a group of attention layers: a page of each of its layers."""
        return sum(region.page_bytes for region in self._regions_of_group(group))

    def read_blocks(self, group: int, blocks: Sequence[int]) -> np.ndarray:
        """A copy of the bytes of some blocks of a group, [blocks, `block_bytes`] uint8.

        Only where no step is in flight: see `StepsInFlight.finish`.
        """
        regions = self._regions_of_group(group)
        return np.concatenate([region.read(list(blocks)) for region in regions], axis=1)

    def write_blocks(self, group: int, blocks: Sequence[int], content: np.ndarray) -> None:
        """Writes what `read_blocks` has read, maybe in another process; only as it reads."""
        start = 0
        for region in self._regions_of_group(group):
            end = start + region.page_bytes
            region.write(list(blocks), content[:, start:end])
            start = end
        finish(self.arrays)

    def _regions_of_group(self, group: int) -> list[RegionMemory]:
        """In the order of the group's layers."""
        found = self.groups[group]
        assert isinstance(found, AttentionGroup)
        return [self._region_of_layer[layer] for layer in found.layers]

    def _all_store_through(self, layers: Sequence[int]) -> bool:
        return all(self.backends[layer].stores_through for layer in layers)
