"""A few requests in one cache, as a server has them, each in blocks of its own."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.decode_probe import takes_batched_offsets
from vllm_metal.startup.probe_requests import probe_prompts


class PagedRequests:
    """Requests of a bound model.

    A request's blocks lie scattered over the cache, and each had another owner before.

    Args:
        binding: the model.
        backends: one for each attention layer.
        num_requests: how many requests there are.
        max_tokens: of one request.
    """

    def __init__(
        self,
        binding: ModelBinding,
        backends: Sequence[AttentionBackend],
        num_requests: int,
        max_tokens: int,
    ):
        smallest = min((backend.block_size for backend in backends), default=max_tokens)
        blocks_each = -(-max_tokens // smallest)
        self.batched_decode = takes_batched_offsets(binding, probe_prompts(None)).holds
        """Whether requests are decoded together, and not one after the other."""
        self.kv_cache = KVCache(backends, 1 + num_requests * blocks_each, binding.states)
        self._model = binding.bind(self.kv_cache)
        ids = 1 + np.random.default_rng(0).permutation(num_requests * blocks_each)
        self._table = ids.reshape(num_requests, blocks_each).astype(np.int32)
        self._earlier_owner = [1] * max_tokens

    def prefill(self, request: int, token_ids: Sequence[int], start: int) -> np.ndarray:
        """Logits [L, vocabulary] of a chunk whose first token stands at position `start`."""
        if start == 0:
            self._prefill(request, self._earlier_owner, 0)
        return self._prefill(request, token_ids, start)

    def decode(
        self, requests: Sequence[int], token_ids: Sequence[int], positions: Sequence[int]
    ) -> np.ndarray:  # [B, vocabulary]
        """Logits of one new token for each of B requests."""
        if len(requests) > 1 and not self.batched_decode:
            rows = zip(requests, token_ids, positions, strict=True)
            return np.concatenate([self.decode([r], [t], [p]) for r, t, p in rows])
        groups = self.kv_cache.groups
        tables = [self._table[list(requests)]] * len(groups)
        metadata = decode_metadata(groups, tables, np.array(positions, np.int32))
        return self._forward([[token] for token in token_ids], metadata)[:, 0]

    def _prefill(self, request: int, token_ids: Sequence[int], start: int) -> np.ndarray:
        groups = self.kv_cache.groups
        tables = [self._table[request]] * len(groups)
        metadata = prefill_metadata(groups, tables, start, len(token_ids))
        return self._forward([token_ids], metadata)[0]

    def _forward(
        self, token_ids: Sequence[Sequence[int]], metadata: Sequence[GroupMetadata]
    ) -> np.ndarray:  # [B, L, vocabulary]
        rows = mx.array([list(row) for row in token_ids])
        logits = self._model.evaluate(rows, metadata, all_rows=True)
        return np.array(logits.astype(mx.float32))
