"""Queries and keys of every layer for a given text, as the calibration of TurboQuant wants them.

The model reads the text in one forward pass over dense pages of its own, and an observer notes the
queries and keys of every layer, after RoPE.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import Chunk
from vllm_metal.attention.metadata import GroupMetadata, PrefillMetadata, StateMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import StateGroup
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.calibration import Sample
from vllm_metal.model.layer_cache import Observer
from vllm_metal.model.model_binding import ModelBinding

BLOCK_SIZE = 16


class KeySamples(Observer):
    """Keeps the queries and keys of one forward pass.

    Args:
        num_kv_heads: H of each layer.
    """

    def __init__(self, num_kv_heads: Sequence[int]):
        self._num_kv_heads = num_kv_heads
        self._keys: dict[int, mx.array] = {}
        """Layer -> [T, H, Dk]."""
        self._queries: dict[int, list[mx.array]] = {}
        """Layer -> [H, G, T, Dk] of each attention over it; several where layers share keys."""

    def stored(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self._keys[layer] = keys

    def attended(self, layer: int, chunk: Chunk, outputs: mx.array) -> None:
        grouped = chunk.queries.reshape(self._num_kv_heads[layer], -1, *chunk.queries.shape[1:])
        self._queries.setdefault(layer, []).append(grouped)

    @property
    def arrays(self) -> list[object]:
        """All that was noted, to evaluate."""
        return [self._keys, self._queries]

    def sample(self, layer: int) -> Sample:
        """Queries [T, Hq, D], or None where the model keeps them to itself, and keys [T, H, D]."""
        keys = _float32(self._keys[layer])
        if layer not in self._queries:
            return None, keys
        queries = mx.concatenate(self._queries[layer], axis=1)  # [H, G, T, Dk]
        return _float32(queries.flatten(0, 1).swapaxes(0, 1)), keys


def collect_key_samples(
    binding: ModelBinding, token_ids: Sequence[int], offset: int
) -> list[Sample]:
    """Queries [T, Hq, D] and keys [T, H, D], float32, of each layer.

    A layer that others share has the queries of all of them, and a layer whose keys are fetched
    has None for its queries: the model keeps them to itself.

    Args:
        binding: the model.
        token_ids: T tokens.
        offset: position of the first.
    """
    length = len(token_ids)
    num_blocks = -(-length // BLOCK_SIZE)
    backends = [DensePages(shape, BLOCK_SIZE, mx.float16) for shape in binding.layers]
    kv_cache = KVCache(backends, 1 + num_blocks, binding.states)
    table, slots = mx.arange(1, 1 + num_blocks)[None], mx.arange(BLOCK_SIZE, BLOCK_SIZE + length)
    chunk = PrefillMetadata(table, slots, 0, length, skipped=offset)
    states = StateMetadata(mx.array([1]), mx.array([1]), begins=True)
    metadata: list[GroupMetadata] = [
        states if isinstance(group, StateGroup) else chunk for group in kv_cache.groups
    ]
    samples = KeySamples([shape.num_kv_heads for shape in binding.layers])
    logits = binding.bind(kv_cache, samples).forward(mx.array([list(token_ids)]), metadata)
    mx.eval(logits, samples.arrays)
    return [samples.sample(layer) for layer in range(len(binding.layers))]


def _float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
