"""Which of the tokens sampled at the positions of a segment a request gains.

Every position is sampled as if the drafts before it were right. The token at a position counts if
they are: if each draft is the token that was sampled at the position before. So a request gains one
token, and one more for each draft that is confirmed. What it gains are the tokens that it would
have sampled one by one, whatever was drafted: the tokens of greedy requests, of seeded ones, and
the distribution of all others.

(Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023,
accept a draft with the probability that the model gives it. Of a draft that is certain, which is
all that is proposed here, sampling and comparing does the same.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from vllm_metal.runner.request_batch import RequestBatch
from vllm_metal.runner.sampler import TorchSampler
from vllm_metal.runner.segments import Segment


@dataclass
class Gains:
    """What the requests of a step gain."""

    tokens: dict[str, list[int]]
    """Tokens of each request that samples, in their order."""
    with_nans: list[str]
    """Requests of which a position that counts has logits that are not finite."""
    logprobs: LogprobsLists | None = None


def confirmed(segment: Segment, position: int, token: int) -> bool:
    """Whether the token sampled at a position of the segment, from 0, is the draft that follows."""
    return position < len(segment.drafts) and segment.drafts[position] == token


def greedy_gains(
    segments: Sequence[Segment], tokens: Sequence[int], finite: Sequence[bool]
) -> Gains:
    """What the segments gain of the most likely token at each of their positions.

    Args:
        segments: that sample.
        tokens: of all their sampled positions, one after the other.
        finite: whether a token can be chosen there.
    """
    gains, row = Gains({}, []), 0
    for segment in segments:
        gained = gains.tokens[segment.req_id] = []
        for position in range(segment.num_samples):
            if not finite[row + position]:
                gains.with_nans.append(segment.req_id)
                break
            gained.append(tokens[row + position])
            if not confirmed(segment, position, gained[-1]):
                break
        row += segment.num_samples
    return gains


def sampled_gains(
    segments: Sequence[Segment],
    first_rows: np.ndarray,
    logits: torch.Tensor,
    finite: np.ndarray,
    batch: RequestBatch,
    sampler: TorchSampler,
) -> Gains:
    """What the segments gain from vLLM's sampler, which is asked for one position of all at a time.

    Each token is appended to its request before the next position is sampled, since penalties, bad
    words and the least number of tokens go by it.

    Args:
        segments: that sample.
        first_rows: [R], where the logits of each row of the batch begin.
        logits: [N, vocabulary], of the sampled positions of all requests.
        finite: [N] bool, whether a token can be chosen there.
        batch: gets the tokens.
        sampler: of the batch's rows.
    """
    gains = Gains({segment.req_id: [] for segment in segments}, [])
    going_on, position = list(segments), 0
    logprobs: list[LogprobsTensors] = []
    while going_on:
        broken = [s.req_id for s in going_on if not finite[first_rows[s.row] + position]]
        gains.with_nans += broken
        going_on = [segment for segment in going_on if segment.req_id not in broken]
        if not going_on:
            break
        rows, active = first_rows.copy(), [segment.row for segment in going_on]
        rows[active] += position
        idle = sorted(set(range(len(rows))) - set(active))
        if position:
            batch.rows.refresh_metadata()
        ours = logits if len(rows) == len(logits) else logits[rows]  # the sampler edits them
        output = sampler.sample(ours, batch.rows, idle)
        if output.logprobs_tensors is not None:
            logprobs.append(output.logprobs_tensors)
        sampled, ahead = output.sampled_token_ids[:, 0].tolist(), []
        for segment in going_on:
            token = sampled[segment.row]
            gains.tokens[segment.req_id].append(token)
            batch.append(segment.req_id, token)
            if confirmed(segment, position, token):
                ahead.append(segment)
        going_on, position = ahead, position + 1
    if logprobs:
        counts = np.zeros(len(first_rows), np.int64)
        for segment in segments:
            counts[segment.row] = len(gains.tokens[segment.req_id])
        gains.logprobs = _by_request(logprobs, counts)
    return gains


def _by_request(logprobs: Sequence[LogprobsTensors], counts: np.ndarray) -> LogprobsLists:
    """Log-probabilities of each position, each of all rows of the batch, in the order of requests.

    Args:
        logprobs: of the first position, of the second, ...
        counts: [R], tokens that each row gains.
    """
    if len(logprobs) == 1:
        return logprobs[0].tolists()
    rows = np.repeat(np.arange(len(counts)), counts)
    begins = np.cumsum(counts) - counts
    positions = np.arange(len(rows)) - np.repeat(begins, counts)
    chosen = torch.from_numpy(positions * len(counts) + rows)
    joined = LogprobsTensors(
        torch.cat([part.logprob_token_ids for part in logprobs])[chosen],
        torch.cat([part.logprobs for part in logprobs])[chosen],
        torch.cat([part.selected_token_ranks for part in logprobs])[chosen],
    )
    return joined.tolists([*begins.tolist(), len(rows)])
