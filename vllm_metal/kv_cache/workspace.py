"""How much temporary memory a step takes, from the peaks of a few small forward passes.

A forward pass of R rows, each of which attends over S tokens, has two phases that grow, and its
peak is that of the greater:

    dense layers    a + b R                  feed-forward layers, logits
    attention       a + b R + c S + d R S    keys and values that are gathered, scores

In a prefill the rows are the tokens of a chunk. In a decode step they are requests: R S tokens
are gathered.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_metal.attention.backend import ChunkMemory
from vllm_metal.kv_cache.groups import most_rounded

DECODE_SHARE = 16
"""Part of the memory that a decode step may take for what it gathers, as 1 / DECODE_SHARE. It runs
as several forward passes where it would take more, unless a prefill takes more anyway."""

MARGIN = 1 / 16
"""Added to what follows from small forward passes: where phases overlap, it is not quite linear."""


MOST_SHARED_ROWS = 256
"""Rows of a decode forward where requests have several: more do not gain from one reading of the
weights, and take memory."""

SCORED_PIECE_BYTES, SCORED_PIECE_ROWS = 32 << 20, 256
"""Bounds on the float32 logits of a piece of a prompt chunk whose rows are scored."""

_SCORED_COPIES = 4
"""Logits of a piece before and after a soft-cap, in float32, and what a reduction holds."""


def most_decode_rows(max_requests: int, num_drafts: int) -> int:
    """Rows of the largest decode forward: one of each request, and one of each draft.

    A step with more rows runs as several forward passes.
    """
    return min(max_requests * (1 + num_drafts), max(max_requests, MOST_SHARED_ROWS))


def scored_piece_rows(vocab_size: int) -> int:
    """Rows of a prompt chunk whose logits are computed at a time for `prompt_logprobs`."""
    return max(1, min(SCORED_PIECE_ROWS, SCORED_PIECE_BYTES // (4 * vocab_size)))


def scoring_bytes(query_len: int, vocab_size: int, hidden_size: int) -> int:
    """Memory that `prompt_logprobs` of a chunk of `query_len` tokens take after its forward pass:
    the hidden states of all rows, and the logits of a piece of them."""
    rows = min(query_len, scored_piece_rows(vocab_size))
    return 4 * (_SCORED_COPIES * rows * vocab_size + query_len * hidden_size)


@dataclass(frozen=True)
class ForwardPeaks:
    """Peaks in bytes, measured with few rows and tokens, and what follows for many."""

    by_rows: dict[int, int]
    """Peaks by number of rows, with a context of a few tokens."""
    by_rows_and_tokens: dict[tuple[int, int], int]
    """Peaks by number of rows and of tokens: all pairs of one or two numbers of each. The numbers
    of rows are small, so that attention takes more memory than anything else."""

    def of(self, rows: int, tokens: int) -> int:
        """Peak of a forward pass of `rows` rows that attend over `tokens` tokens each."""
        return self.of_chunk(ChunkMemory(rows, tokens, rows))

    def of_chunk(self, chunk: ChunkMemory) -> int:
        """Peak of the forward pass of a prefill chunk."""
        return round((1 + MARGIN) * max(self._dense(chunk.query_len), self._attention(chunk)))

    def _dense(self, rows: int) -> float:
        few, many = min(self.by_rows), max(self.by_rows)
        low = self.by_rows[few]
        return low + _slope(few, low, many, self.by_rows[many]) * (rows - few)

    def _attention(self, chunk: ChunkMemory) -> float:
        peaks = self.by_rows_and_tokens
        (few, short), (many, long) = min(peaks), max(peaks)
        by_tokens = [_slope(short, peaks[r, short], long, peaks[r, long]) for r in (few, many)]
        product = _slope(few, by_tokens[0], many, by_tokens[1])
        by_token = max(0.0, by_tokens[0] - product * few)
        by_row = _slope(few, peaks[few, short], many, peaks[many, short])
        by_row = max(0.0, by_row - product * short)
        constant = peaks[few, short] - by_row * few - by_token * short - product * few * short
        score_bytes = max(product, chunk.score_bytes)
        scores = score_bytes * chunk.scored_rows * chunk.whole_tokens
        return constant + by_row * chunk.query_len + by_token * chunk.whole_tokens + scores


def _slope(x: float, y: float, other_x: float, other_y: float) -> float:
    """Slope of the line through two points; 0 where it falls, or where the points are one."""
    return max(0.0, (other_y - y) / (other_x - x)) if other_x > x else 0.0


@dataclass(frozen=True)
class StepMemory:
    """Memory that the steps of a server take in addition to weights and pages."""

    prefill: ForwardPeaks
    chunks: Sequence[ChunkMemory]
    """The largest chunk, as each kind of layer has it."""
    decode: ForwardPeaks
    max_requests: int
    """Rows of a decode step."""
    max_tokens: int
    """Tokens that a request holds, rounded up as `DecodeGraphs` does; 1 where it holds none."""
    scoring: int = 0
    """Bytes for the prompt logprobs of the largest chunk."""
    decodes_at_once: int = 1
    """Decode steps whose memory is held at a time: 2 where one is dispatched while another runs."""

    def workspace(self, page_bytes: int, num_tokens: int) -> int:
        """Bytes for any step.

        Args:
            page_bytes: what pages may take at most.
            num_tokens: tokens of all requests together, in the layer that holds most.
        """
        decode = self.decode_bytes(most_rounded(num_tokens))
        return max(
            *map(self.prefill.of_chunk, self.chunks),
            self.scoring,
            self.decodes_at_once * self.decode.of(1, self.max_tokens),
            min(decode, page_bytes // DECODE_SHARE),
        )

    def decode_bytes(self, num_tokens: int) -> int:
        """Peak of decode steps that gather `num_tokens` tokens each, over all requests."""
        few = min(self.max_requests, -(-num_tokens // self.max_tokens))
        extremes = {max(1, few), self.max_requests}
        return self.decodes_at_once * max(
            self.decode.of(rows, min(self.max_tokens, -(-num_tokens // rows))) for rows in extremes
        )

    def decode_tokens(self, workspace: int) -> int:
        """The largest number of tokens that a decode forward may gather within `workspace`."""
        most = range(self.max_requests * self.max_tokens + 1)
        return max(self.max_tokens, bisect_right(most, workspace, key=self.decode_bytes) - 1)
