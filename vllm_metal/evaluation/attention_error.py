"""How far attention over compressed pages is from exact attention over the same keys and values."""

import math
from collections.abc import Sequence

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Chunk
from vllm_metal.evaluation.sequence import PREFILL_CHUNK, PagedSequence
from vllm_metal.metal_kernel_backend.causal_attention import attend_to_itself
from vllm_metal.model.layer_cache import Observer
from vllm_metal.model.model_binding import ModelBinding


class _AgainstExactAttention(Observer):
    """Compares each chunk's outputs with exact attention of the chunk over itself."""

    def __init__(self, binding: ModelBinding):
        self._windows = [shape.sliding_window for shape in binding.layers]
        self.errors: dict[int, mx.array] = {}
        """Layer -> sum of squared differences over the sum of squares of the exact outputs."""

    def attended(self, layer: int, chunk: Chunk, outputs: mx.array) -> None:
        exact = attend_to_itself(chunk, self._windows[layer])
        self.errors[layer] = mx.sum((outputs - exact) ** 2) / mx.sum(exact**2)


def attention_error(
    binding: ModelBinding, backends: Sequence[AttentionBackend], token_ids: Sequence[int]
) -> float:
    """Relative error of the attention outputs, root mean square over the layers that attend here.

    NaN where none does: the model computes attention itself.

    Args:
        binding: the model.
        backends: one for each layer.
        token_ids: read as one chunk, as far as one chunk goes.
    """
    chunk = token_ids[:PREFILL_CHUNK]
    observer = _AgainstExactAttention(binding)
    for _ in PagedSequence(binding, backends, len(chunk), observer).prefill(chunk):
        pass
    if not observer.errors:
        return math.nan
    return float(mx.sqrt(mx.mean(mx.stack(list(observer.errors.values())))))
