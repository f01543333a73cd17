"""Symbolic pages: the runner under vLLM's own scheduler, without a model.

A page holds, for each token stored in it, the position, the token and a digest of all tokens up to
it. The model's stand-in reads what attention would read: it checks that these are the tokens of
one request without a gap, and answers with a token that depends on the digest of the whole
context. So a read of what was never written, or of what another request wrote, raises at once, and
the right answer to any prompt is known without running anything: `expected_tokens`.

Pages without recurrent states count as written by kernels, so that a step is dispatched while the
one before runs. A dispatched step may read and write its blocks at any time until it is waited for.
Whatever touches them meanwhile has to depend on its tokens, or raises.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import KVCacheSpec

from tests.serving import Serving
from vllm_metal.attention.metadata import (
    AttentionMetadata,
    DecodeMetadata,
    GroupMetadata,
    PrefillMetadata,
    StateMetadata,
)
from vllm_metal.kv_cache.groups import AttentionGroup, KVGroup, StateGroup
from vllm_metal.kv_cache.spec import KV_CACHE_LAYOUT, block_table_sizes, cache_layout
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODULUS = (1 << 61) - 1


class WrongReadError(AssertionError):
    """A forward pass would read something else than the tokens of its request."""


@dataclass(frozen=True)
class Entry:
    """One token in a page, or the state after it."""

    group: int
    position: int
    token: int
    digest: int
    """Of all tokens of the request up to this one."""


def extended(digest: int, token: int) -> int:
    """The digest of a context and one more token; that of no tokens is 0."""
    return (digest * 1_000_003 + token + 1) % _MODULUS


def next_token(digest: int, vocab_size: int) -> int:
    """The token that follows a context."""
    return digest % vocab_size


def expected_tokens(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The right answer to a prompt."""
    digest, tokens = 0, []
    for token in prompt:
        digest = extended(digest, token)
    for _ in range(num_tokens):
        tokens.append(next_token(digest, vocab_size))
        digest = extended(digest, tokens[-1])
    return tokens


@dataclass
class Blocks:
    """The blocks that a step has read and written."""

    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class SymbolicPages:
    """Takes the place of `KVCache`."""

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int):
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.shares_arrays = any(isinstance(group, StateGroup) for group in groups)
        self.stores_through = not self.shares_arrays
        self.arrays: list[mx.array] = []
        self._building = Blocks()
        """Of what is built and neither evaluated nor dispatched."""
        self._in_flight: list[Blocks] = []
        self._follows_tokens = False
        self._blocks: dict[int, dict[int, Entry]] = {}
        """Block -> place in the block -> entry; a recurrent state is at place 0."""

    def evaluate(self, *outputs: mx.array) -> None:
        mx.eval(*outputs)
        self._building = Blocks()

    def dispatch(self, *arrays) -> Callable[[], None]:
        """As late as can be: nothing is computed before it is waited for."""
        step, self._building = self._building, Blocks()
        self._in_flight.append(step)

        def wait() -> None:
            self._in_flight = [other for other in self._in_flight if other is not step]
            mx.eval(*arrays)

        return wait

    def begin_forward(self, token_ids: mx.array) -> None:
        """Finds out whether a forward pass runs after the steps in flight, by its graph."""
        graph = io.StringIO()
        mx.export_to_dot(graph, token_ids)
        self._follows_tokens = "ArgReduce" in graph.getvalue()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self._follows_tokens = False
        for source, destination in copies:
            self._check_order(source, writes=False)
            self._check_order(destination, writes=True)
            self._blocks[destination] = dict(self._blocks.get(source, {}))

    def _check_order(self, block: int, writes: bool) -> None:
        """Notes that a block is read or written, which must not happen during a step in flight."""
        (self._building.written if writes else self._building.read).add(block)
        if self._follows_tokens:
            return
        for step in self._in_flight:
            if block in step.written or (writes and block in step.read):
                use = "written" if writes else "read"
                raise WrongReadError(f"block {block} is {use} while a dispatched step may use it")

    def write(self, block: int, place: int, entry: Entry) -> None:
        if block == 0:
            raise WrongReadError("a write to the null block")
        self._check_order(block, writes=True)
        entries = self._blocks.setdefault(block, {})
        if any(other.group != entry.group for other in entries.values()):
            entries.clear()  # the block has changed hands
        entries[place] = entry

    def read(self, block: int, place: int, group: int, position: int) -> Entry:
        self._check_order(block, writes=False)
        entry = self._blocks.get(block, {}).get(place)
        if entry is None or (entry.group, entry.position) != (group, position):
            raise WrongReadError(
                f"group {group} reads position {position} in block {block}, which holds {entry}"
            )
        return entry


class SymbolicModel:
    """Takes the place of `BoundModel`, over `SymbolicPages`."""

    def __init__(self, pages: SymbolicPages, vocab_size: int):
        self.kv_cache = self._pages = pages
        self._vocab_size = vocab_size
        self.num_forwards = 0

    def forward(
        self,
        token_ids: mx.array,  # [T or 1, L]
        metadata: Sequence[GroupMetadata],
        all_rows: bool = False,
    ) -> mx.array:  # [T or 1, 1 or L, vocabulary]
        self.num_forwards += 1
        self._pages.begin_forward(token_ids)
        metadata, tokens = [getattr(told, "rows", told) for told in metadata], np.array(token_ids)
        digests = np.zeros(tokens.shape, np.int64)
        for row in range(len(tokens)):
            start = self._start(metadata, row)
            found = [
                self._run(index, group, told, row, start, tokens[row].tolist())
                for index, (group, told) in enumerate(
                    zip(self._pages.groups, metadata, strict=True)
                )
            ]
            if any(other != found[0] for other in found):
                raise WrongReadError(f"the groups of a request hold different contexts: {found}")
            digests[row] = found[0]
        logits = np.zeros((*tokens.shape, self._vocab_size), np.float32)
        np.put_along_axis(logits, (digests % self._vocab_size)[..., None], 1, axis=-1)
        return mx.array(logits if all_rows else logits[:, -1:])

    def _start(self, metadata: Sequence[GroupMetadata], row: int) -> int | None:
        """Position of the first new token, as the attention layers are told it."""
        for told in metadata:
            if isinstance(told, StateMetadata):
                continue
            if isinstance(told, DecodeMetadata) and not isinstance(told.offset, int):
                return int(told.offset[row].item())
            return told.offset
        return None

    def _run(
        self,
        index: int,
        group: KVGroup,
        told: GroupMetadata,
        row: int,
        start: int | None,
        tokens: list[int],
    ) -> list[int]:
        """Reads the context in one group, writes the new tokens; gives their digests."""
        if isinstance(told, StateMetadata):
            return self._run_state(index, told, row, start, tokens)
        digest = self._context(index, group, told, row, start)
        slots = np.array(told.slot_mapping).reshape(-1)
        slots = slots[row : row + 1] if isinstance(told, DecodeMetadata) else slots
        digests = []
        for i, (token, slot) in enumerate(zip(tokens, slots.tolist(), strict=True)):
            digest = extended(digest, token)
            digests.append(digest)
            entry = Entry(index, start + i, token, digest)
            self._pages.write(*divmod(slot, group.block_size), entry)
        return digests

    def _context(
        self, index: int, group: AttentionGroup, told: AttentionMetadata, row: int, start: int
    ) -> int:
        """Digest of what precedes position `start`, all that attention sees of it checked."""
        table = np.array(told.block_table)[row]
        if isinstance(told, PrefillMetadata):
            held = told.context_len
        else:
            held = int(np.array(told.seq_lens)[row]) - 1
        begin = start - held  # position of the table's first token
        first = begin
        if group.sliding_window is not None:
            first = max(begin, start + 1 - group.sliding_window)
        digest = 0
        for position in range(first, start):
            block, place = divmod(position - begin, group.block_size)
            entry = self._pages.read(int(table[block]), place, index, position)
            known = position > first or first == 0
            if known and entry.digest != extended(digest, entry.token):
                raise WrongReadError(f"position {position} is another request's: {entry}")
            digest = entry.digest
        return digest

    def _run_state(
        self, index: int, told: StateMetadata, row: int, start: int | None, tokens: list[int]
    ) -> list[int]:
        read, write = (int(np.array(ids)[row]) for ids in (told.read_ids, told.write_ids))
        digest, position = 0, -1
        if not told.begins:
            position = start - 1 if start is not None else self._last_position(read, index)
            digest = self._pages.read(read, 0, index, position).digest
        digests = []
        for token in tokens:
            digest = extended(digest, token)
            digests.append(digest)
        last = position + len(tokens)
        self._pages.write(write, 0, Entry(index, last, tokens[-1], digest))
        return digests

    def _last_position(self, block: int, index: int) -> int:
        entry = self._pages._blocks.get(block, {}).get(0)
        if entry is None or entry.group != index:
            raise WrongReadError(f"group {index} reads the state in block {block}: {entry}")
        return entry.position


class SymbolicServing(Serving):
    """vLLM's scheduler and our runner over symbolic pages.

    Args:
        config: vLLM's configuration.
        specs: of each layer, named as `vllm_metal.kv_cache.spec` names them.
        num_blocks: of the pool, the null block included.
    """

    def __init__(self, config: "VllmConfig", specs: dict[str, KVCacheSpec], num_blocks: int):
        config.cache_config.kv_cache_layout = KV_CACHE_LAYOUT
        config.cache_config.num_gpu_blocks_override = num_blocks
        [planned] = get_kv_cache_configs(config, [specs], [1 << 40])
        layout = cache_layout(planned)
        vocab_size = config.model_config.get_vocab_size()
        self.pages = SymbolicPages(layout.groups, planned.num_blocks)
        self.model = SymbolicModel(self.pages, vocab_size)
        self.worker = ModelRunner(
            config,
            self.model,
            DecodeForward(self.model.forward, True, most_tokens=1 << 30, most_rows=1 << 30),
            block_table_sizes(config, planned),
            self.pages.dispatch,
        )
        self._start_scheduler(config, planned)

    @property
    def runner(self) -> ModelRunner:
        return self.worker
