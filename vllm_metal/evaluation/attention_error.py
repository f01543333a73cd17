"""How far attention over compressed pages is from exact attention over the same keys and values."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Chunk, Pages
from vllm_metal.evaluation.sequence import PREFILL_CHUNK, PagedSequence
from vllm_metal.metal_kernel_backend.causal_attention import attend_to_itself
from vllm_metal.model.model_binding import ModelBinding


class WithAttentionError:
    """A backend that is also compared with exact attention, in each chunk without a context."""

    def __init__(self, backend: AttentionBackend):
        self._backend = backend
        self.error: mx.array | None = None
        """Sum of squared differences over the sum of squares of the exact outputs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prefill(self, pages: Pages, chunk: Chunk) -> mx.array:
        out = self._backend.prefill(pages, chunk)
        exact = attend_to_itself(chunk, self._backend.shape.sliding_window)
        self.error = mx.sum((out - exact) ** 2) / mx.sum(exact**2)
        return out


def attention_error(
    binding: ModelBinding, observed: Sequence[WithAttentionError], token_ids: Sequence[int]
) -> float:
    """Relative error of the attention outputs, root mean square over the layers that attend here.

    NaN where none does: the model computes attention itself.

    Args:
        binding: the model.
        observed: one for each layer.
        token_ids: read as one chunk, as far as one chunk goes.
    """
    chunk = token_ids[:PREFILL_CHUNK]
    for _ in PagedSequence(binding, observed, len(chunk)).prefill(chunk):
        pass
    errors = [backend.error for backend in observed if backend.error is not None]
    return mx.sqrt(mx.mean(mx.stack(errors))).item() if errors else math.nan
