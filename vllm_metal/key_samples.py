"""Queries and keys of every layer for a given text, as the calibration of TurboQuant wants them.

The model reads the tokens in one forward with backends that keep no pages: each layer attends
exactly over the tokens at hand and notes its queries and keys, after RoPE.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, LayerShape, Pages
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.causal_attention import causal_attention


class _Recorder(AttentionBackend):
    """Attends over the chunk alone and keeps its queries and keys."""

    name = "recorder"
    slot_size = 0
    page_dtype = mx.uint16

    def __init__(self, shape: LayerShape):
        super().__init__(shape, block_size=1)
        self.queries: mx.array | None = None  # [Hq, L, Dk]
        self.keys: mx.array | None = None  # [H, L, Dk]

    def store(
        self,
        pages: Pages,
        keys: mx.array,
        values: mx.array,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Pages:
        return pages

    def prefill(
        self,
        pages: Pages,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        metadata: PrefillMetadata,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        self.queries, self.keys = queries, keys
        own, window = (queries[None], keys[None], values[None]), self.shape.sliding_window
        return causal_attention(*own, scale, sinks, window)[0]

    def decode(self, *_) -> mx.array:
        raise NotImplementedError("samples are taken in a prefill")

    def prefill_workspace_bytes(self, context_len: int, query_len: int, num_heads: int) -> int:
        return 0


def collect_key_samples(
    binding: ModelBinding, token_ids: Sequence[int], offset: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries [T, Hq, Dk] and keys [T, H, Dk], float32, of each layer.

    Args:
        binding: the model; left bound to no pages.
        token_ids: T tokens.
        offset: position of the first.
    """
    recorders = [_Recorder(shape) for shape in binding.layers]
    kv_cache = KVCache(recorders, 0)
    binding.bind(kv_cache)
    empty = mx.zeros((1, 0), mx.int32)
    metadata = PrefillMetadata(empty, empty[0], context_len=offset, query_len=len(token_ids))
    logits = binding.forward(mx.array([list(token_ids)]), [metadata] * len(kv_cache.groups))
    mx.eval(logits, [(recorder.queries, recorder.keys) for recorder in recorders])
    binding.bind(None)
    return [
        tuple(
            np.array(part.swapaxes(0, 1).astype(mx.float32))
            for part in (recorder.queries, recorder.keys)
        )
        for recorder in recorders
    ]
