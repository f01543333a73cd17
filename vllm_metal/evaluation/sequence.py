"""Runs one token sequence through a bound model and its pages, without a scheduler."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.kv_cache.cache import KVCache

PREFILL_CHUNK = 512


class PagedSequence:
    """One request that owns blocks 1, 2, 3, ... of a cache of its own.

    Args:
        binding: the model.
        backends: one for each layer.
        max_tokens: length the pages have room for.
    """

    def __init__(
        self, binding: ModelBinding, backends: Sequence[AttentionBackend], max_tokens: int
    ):
        self.binding = binding
        smallest = min((backend.block_size for backend in backends), default=8)
        self.num_blocks = -(-max_tokens // smallest)
        self.kv_cache = KVCache(backends, self.num_blocks + 1, binding.states)
        self.length = 0

    def prefill(self, token_ids: Sequence[int]) -> Iterator[mx.array]:
        """Appends tokens in chunks; yields the float32 logits [L, vocabulary] of each chunk."""
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            groups = self.kv_cache.groups
            metadata = prefill_metadata(groups, self._tables(), self.length, len(chunk))
            yield self._forward([list(chunk)], metadata, all_rows=True)[0]
            self.length += len(chunk)

    def decode_at(self, token_ids: Sequence[int], positions: Sequence[int]) -> mx.array:
        """Logits [B, vocabulary] of a decode step at each of several positions already stored.

        Each row is the request as it was when its newest token stood at that position.
        """
        tables = [np.tile(table, (len(positions), 1)) for table in self._tables()]
        last = np.array(list(positions), np.int32)
        metadata = decode_metadata(self.kv_cache.groups, tables, last)
        return self._forward([[token_ids[p]] for p in positions], metadata)[:, -1]

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Appends `token_ids` and generates; the sequence keeps what it had before."""
        before = self.length
        *_, logits = self.prefill(token_ids)
        tokens = list(token_ids)
        generated: list[int] = []
        while True:
            token = int(mx.argmax(logits[-1]).item())
            generated.append(token)
            if len(generated) == new_tokens:
                break
            tokens.append(token)
            position = before + len(tokens) - 1
            row = [0] * before + tokens
            logits = self.decode_at(row, [position])
        self.length = before
        return generated

    def _tables(self) -> list[np.ndarray]:
        """The block table of each group, int32 [N]."""
        blocks = np.arange(1, self.num_blocks + 1, dtype=np.int32)
        return [blocks] * len(self.kv_cache.groups)

    def _forward(
        self,
        token_ids: list[list[int]],
        metadata: Sequence[GroupMetadata],
        all_rows: bool = False,
    ) -> mx.array:
        self.binding.bind(self.kv_cache)
        logits = self.binding.forward(mx.array(token_ids), metadata, all_rows).astype(mx.float32)
        self.kv_cache.evaluate(logits)
        return logits
