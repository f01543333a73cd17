"""Runs one token sequence through a bound model and its pages, without a scheduler."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.model.layer_cache import Observer
from vllm_metal.model.model_binding import ModelBinding

PREFILL_CHUNK = 512

MAX_ROWS = 8
"""Rows that are computed from their first token at a time, each with pages of its own."""


class PagedSequence:
    """One request that owns blocks 1, 2, 3, ... of a cache of its own.

    A recurrent state is in the first of them, and saved in one after the last.

    Args:
        binding: the model.
        backends: one for each layer.
        max_tokens: length the pages have room for.
        observer: sees what passes through the layers.
    """

    def __init__(
        self,
        binding: ModelBinding,
        backends: Sequence[AttentionBackend],
        max_tokens: int,
        observer: Observer | None = None,
    ):
        self.binding = binding
        self._observer = observer
        self._backends = backends
        self._num_blocks = self._blocks_for(max_tokens)
        self.kv_cache = self._cache(self._num_blocks + bool(binding.states))
        self.length = 0
        self._state_length = 0
        """Tokens that the recurrent states have seen."""

    def prefill(self, token_ids: Sequence[int]) -> Iterator[mx.array]:
        """Appends tokens in chunks; yields the float32 logits [L, vocabulary] of each chunk."""
        table = _blocks(1, self._num_blocks)
        for logits in self._prefill(self.kv_cache, token_ids, self.length, table):
            yield logits
            self.length += logits.shape[0]
            self._state_length = self.length

    def decode_at(self, token_ids: Sequence[int], positions: Sequence[int]) -> mx.array:
        """Logits [B, vocabulary] of a decode step at each of several positions already stored.

        Each row is the request as it was when its newest token stood at that position. A recurrent
        state is at one position only, so rows at others are computed from their first token.
        """
        if self.binding.states and list(positions) != [self._state_length]:
            starts = range(0, len(positions), MAX_ROWS)
            parts = [positions[start : start + MAX_ROWS] for start in starts]
            return mx.concatenate([self._decode_from_start(token_ids, part) for part in parts])
        self._state_length = positions[0] + 1
        table = np.tile(_blocks(1, self._num_blocks), (len(positions), 1))
        return self._decode(self.kv_cache, token_ids, positions, table)

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Appends `token_ids` and generates; the sequence keeps what it had before."""
        before, saved = self.length, self._num_blocks + 1
        self._copy_state(1, saved)
        *_, logits = self.prefill(token_ids)
        tokens = list(token_ids)
        generated: list[int] = []
        while True:
            token = int(np.argmax(np.array(logits[-1])))
            generated.append(token)
            if len(generated) == new_tokens:
                break
            tokens.append(token)
            position = before + len(tokens) - 1
            row = [0] * before + tokens
            logits = self.decode_at(row, [position])
        self.length = self._state_length = before
        self._copy_state(saved, 1)
        return generated

    def _decode_from_start(self, token_ids: Sequence[int], positions: Sequence[int]) -> mx.array:
        """`decode_at`, with all tokens computed again from the first, in pages of their own."""
        each = self._blocks_for(max(positions) + 1)
        kv_cache = self._cache(len(positions) * each)
        table = np.stack([_blocks(1 + row * each, each) for row in range(len(positions))])
        for row, position in zip(table, positions, strict=True):
            for _ in self._prefill(kv_cache, token_ids[:position], 0, row):
                pass
        return self._decode(kv_cache, token_ids, positions, table)

    def _decode(
        self,
        kv_cache: KVCache,
        token_ids: Sequence[int],
        positions: Sequence[int],
        table: np.ndarray,
    ) -> mx.array:
        tables = [table] * len(kv_cache.groups)
        metadata = decode_metadata(kv_cache.groups, tables, np.array(positions, np.int32))
        return self._forward(kv_cache, [[token_ids[p]] for p in positions], metadata)[:, -1]

    def _prefill(
        self, kv_cache: KVCache, token_ids: Sequence[int], start: int, table: np.ndarray
    ) -> Iterator[mx.array]:
        tables = [table] * len(kv_cache.groups)
        for first in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = list(token_ids[first : first + PREFILL_CHUNK])
            metadata = prefill_metadata(kv_cache.groups, tables, start + first, len(chunk))
            yield self._forward(kv_cache, [chunk], metadata, all_rows=True)[0]

    def _forward(
        self,
        kv_cache: KVCache,
        token_ids: list[list[int]],
        metadata: Sequence[GroupMetadata],
        all_rows: bool = False,
    ) -> mx.array:
        model = self.binding.bind(kv_cache, self._observer)
        return model.evaluate(mx.array(token_ids), metadata, all_rows).astype(mx.float32)

    def _copy_state(self, source: int, destination: int) -> None:
        if self.binding.states:
            self.kv_cache.states.copy(source, destination)

    def _cache(self, num_blocks: int) -> KVCache:
        return KVCache(self._backends, num_blocks + 1, self.binding.states)

    def _blocks_for(self, num_tokens: int) -> int:
        smallest = min((backend.block_size for backend in self._backends), default=num_tokens)
        return -(-num_tokens // smallest)


def _blocks(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)
