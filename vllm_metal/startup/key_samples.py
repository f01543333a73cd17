"""Queries and keys of every layer for a given text, as the calibration of TurboQuant wants them.

The model reads the tokens in one forward with backends that keep no pages: each layer attends
exactly over the tokens at hand and notes its queries and keys, after RoPE.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, Chunk, ChunkMemory, LayerShape, Pages
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata, StateMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.groups import StateGroup
from vllm_metal.metal_kernel_backend.causal_attention import attend_to_itself
from vllm_metal.metal_kernel_backend.turboquant.calibration import Sample
from vllm_metal.model.model_binding import ModelBinding


class _Recorder(AttentionBackend):
    """Attends over the chunk alone and keeps its queries and keys."""

    name = "recorder"
    slot_size = page_size_bytes = 0
    page_dtype = mx.uint16

    def __init__(self, shape: LayerShape):
        super().__init__(shape, block_size=1)
        self.queries: list[mx.array] = []  # [H, G, L, Dk] of each attention over this layer
        self.keys: mx.array | None = None  # [L, H, Dk]

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        self.keys = keys
        return pages

    def read(self, *_) -> tuple[mx.array, mx.array]:
        raise NotImplementedError("there are no pages")

    def prefill(self, pages: Pages, chunk: Chunk) -> mx.array:
        grouped = chunk.queries.reshape(self.shape.num_kv_heads, -1, *chunk.queries.shape[1:])
        self.queries.append(grouped)
        return attend_to_itself(chunk, self.shape.sliding_window)

    def decode(self, *_) -> mx.array:
        raise NotImplementedError("samples are taken in a prefill")

    def attended_memory(self, *_) -> ChunkMemory:
        raise NotImplementedError("no server runs on it")

    def sample(self) -> Sample:
        keys = _float32(self.keys)
        if not self.queries:
            return None, keys
        queries = mx.concatenate(self.queries, axis=1)  # [H, G, L, Dk]
        return _float32(queries.flatten(0, 1).swapaxes(0, 1)), keys


def collect_key_samples(
    binding: ModelBinding, token_ids: Sequence[int], offset: int
) -> list[Sample]:
    """Queries [T, Hq, Dk] and keys [T, H, Dk], float32, of each layer.

    A layer that others share has the queries of all of them, and a layer whose keys are fetched
    has None for its queries: the model keeps them to itself.

    Args:
        binding: the model; left bound to no pages.
        token_ids: T tokens.
        offset: position of the first.
    """
    recorders = [_Recorder(shape) for shape in binding.layers]
    kv_cache = KVCache(recorders, 0, binding.states)
    binding.bind(kv_cache)
    empty = mx.zeros((1, 0), mx.int32)
    chunk = PrefillMetadata(empty, empty[0], 0, len(token_ids), skipped=offset)
    no_state = StateMetadata(empty[0], begins=True)
    metadata = [no_state if isinstance(group, StateGroup) else chunk for group in kv_cache.groups]
    logits = binding.forward(mx.array([list(token_ids)]), metadata)
    mx.eval(logits, [(recorder.queries, recorder.keys) for recorder in recorders])
    binding.bind(None)
    return [recorder.sample() for recorder in recorders]


def _float32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
