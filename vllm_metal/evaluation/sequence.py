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

MAX_STATES = 8
"""Rows of a decode step that have a recurrent state of their own."""


class PagedSequence:
    """One request that owns blocks 1, 2, 3, ... of a cache of its own.

    Recurrent states are in the blocks after those: one for the sequence, one to save it in, and
    `MAX_STATES` for decode steps at other positions.

    Args:
        binding: the model.
        backends: one for each layer.
        max_tokens: length the pages have room for.
    """

    def __init__(
        self, binding: ModelBinding, backends: Sequence[AttentionBackend], max_tokens: int
    ):
        self.binding = binding
        block_sizes = [backend.block_size for backend in backends]
        self.num_blocks = -(-max_tokens // min(block_sizes, default=max_tokens))
        self._own_state, self._saved_state = self.num_blocks + 1, self.num_blocks + 2
        last_block = self._saved_state + MAX_STATES if binding.states else self.num_blocks
        self.kv_cache = KVCache(backends, last_block + 1, binding.states)
        self.length = 0
        self._state_length = 0
        """Tokens that the recurrent states have seen."""

    def prefill(self, token_ids: Sequence[int]) -> Iterator[mx.array]:
        """Appends tokens in chunks; yields the float32 logits [L, vocabulary] of each chunk."""
        for logits in self._prefill(token_ids, self.length, self._own_state):
            yield logits
            self.length += logits.shape[0]
            self._state_length = self.length

    def decode_at(self, token_ids: Sequence[int], positions: Sequence[int]) -> mx.array:
        """Logits [B, vocabulary] of a decode step at each of several positions already stored.

        Each row is the request as it was when its newest token stood at that position. Recurrent
        states exist for one position only, so for others they are computed anew.
        """
        states = np.full(len(positions), self._own_state, np.int32)
        if self.binding.states and list(positions) != [self._state_length]:
            if len(positions) > MAX_STATES:
                halves = positions[:MAX_STATES], positions[MAX_STATES:]
                return mx.concatenate([self.decode_at(token_ids, half) for half in halves])
            states = self._saved_state + 1 + np.arange(len(positions), dtype=np.int32)
            for position, state in zip(positions, states.tolist(), strict=True):
                for _ in self._prefill(token_ids[:position], 0, state):
                    pass
        else:
            self._state_length = positions[0] + 1
        blocks = np.tile(self._blocks(), (len(positions), 1))
        tables = self._tables(blocks, states[:, None])
        metadata = decode_metadata(self.kv_cache.groups, tables, np.array(positions, np.int32))
        return self._forward([[token_ids[p]] for p in positions], metadata)[:, -1]

    def greedy(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Appends `token_ids` and generates; the sequence keeps what it had before."""
        before = self.length
        if self.binding.states:
            self.kv_cache.copy_blocks([(self._own_state, self._saved_state)])
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
        self.length = self._state_length = before
        if self.binding.states:
            self.kv_cache.copy_blocks([(self._saved_state, self._own_state)])
        return generated

    def _prefill(self, token_ids: Sequence[int], start: int, state: int) -> Iterator[mx.array]:
        tables = self._tables(self._blocks(), np.array([state], np.int32))
        for first in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = list(token_ids[first : first + PREFILL_CHUNK])
            groups = self.kv_cache.groups
            metadata = prefill_metadata(groups, tables, start + first, len(chunk))
            yield self._forward([chunk], metadata, all_rows=True)[0]

    def _blocks(self) -> np.ndarray:
        return np.arange(1, self.num_blocks + 1, dtype=np.int32)

    def _tables(self, blocks: np.ndarray, states: np.ndarray) -> list[np.ndarray]:
        """The block table of each group."""
        return [states if group.states else blocks for group in self.kv_cache.groups]

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
