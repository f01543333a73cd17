"""Samples tokens from logits: with vLLM's sampler in torch, or by argmax in MLX where enough."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.sampler import Sampler

from vllm_metal.kv_cache.workspace import scored_piece_rows

if TYPE_CHECKING:
    from vllm.config.model import LogprobsMode
    from vllm.v1.sample.logits_processor import LogitsProcessor, LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch


_IDLE_WITHOUT = {MinTokensLogitsProcessor: "min_toks", LogitBiasLogitsProcessor: "biases"}
"""vLLM's own logits processors that may change a greedy token, each with its attribute that is
empty while no request of the batch uses it."""


def needs_torch(metadata: "SamplingMetadata") -> bool:
    """Whether vLLM's sampler would do more with this batch than take the argmax of the logits.

    Structured outputs are not part of the metadata: the scheduler sends their bitmask with the
    step.
    """
    thinking_budget = metadata.thinking_budget_state_holder
    return bool(
        not metadata.all_greedy
        or metadata.max_num_logprobs is not None
        or metadata.logprob_token_ids
        or not metadata.no_penalties
        or metadata.allowed_token_ids_mask is not None
        or metadata.bad_words_token_ids
        or any(map(_is_active, metadata.logitsprocs.non_argmax_invariant))
        or (thinking_budget is not None and thinking_budget.has_tracked_requests())
    )


def custom_processors(processors: "LogitsProcessors") -> "list[LogitsProcessor]":
    """The logits processors that are not vLLM's own: of `--logits-processors` and of plugins."""
    return [p for p in processors.all if type(p) not in BUILTIN_LOGITS_PROCESSORS]


def _is_active(processor: "LogitsProcessor") -> bool:
    """Whether a processor may change a greedy token of this batch; custom ones always may."""
    requests = _IDLE_WITHOUT.get(type(processor))
    return requests is None or bool(getattr(processor, requests))


def greedy(logits: mx.array) -> mx.array:  # [R, vocabulary] -> [R] int32
    """The most likely token of each row, lazily."""
    return mx.argmax(logits, axis=-1).astype(mx.int32)


def to_torch(logits: mx.array) -> torch.Tensor:
    """float32 logits in memory of their own, since vLLM's sampler edits them in place."""
    return torch.from_numpy(np.array(logits.astype(mx.float32)))


class TorchSampler:
    """vLLM's sampler over the rows of the batch."""

    def __init__(self, logprobs_mode: "LogprobsMode", use_fp64_gumbel: bool = False):
        self._sampler = Sampler(logprobs_mode, use_fp64_gumbel)
        self._logprobs_mode = logprobs_mode

    def sample(
        self,
        logits: torch.Tensor,  # [R, vocabulary] float32, rows as in the batch
        rows: "InputBatch",
        incomplete: Sequence[int],
    ) -> SamplerOutput:
        """Samples every row.

        Rows named in `incomplete` belong to unfinished prompts. Their samples are discarded by
        the caller and their generators put back, so that a seed gives the same tokens however a
        prompt is cut into chunks.
        """
        kept = {
            row: generator.get_state()
            for row in incomplete
            if (generator := rows.generators.get(row)) is not None
        }
        output = self._sampler(logits=logits, sampling_metadata=rows.sampling_metadata)
        for row, state in kept.items():
            rows.generators[row].set_state(state)
        return output

    def score_prompt(
        self,
        request: "CachedRequestState",
        num_scheduled: int,
        vocab_size: int,
        chunk_logits: Callable[[int, int], torch.Tensor],
    ) -> LogprobsTensors | None:
        """Adds one prompt chunk to the request's prompt logprobs; returns them once complete.

        Args:
            request: a request with `prompt_logprobs` set.
            num_scheduled: tokens of the chunk.
            vocab_size: what `prompt_logprobs=-1` stands for.
            chunk_logits: gives float32 logits of the chunk's tokens from one to another; asked for
                few at a time.
        """
        assert request.sampling_params is not None and request.prompt_token_ids is not None
        wanted = request.sampling_params.prompt_logprobs
        assert wanted is not None
        num_logprobs = vocab_size if wanted == -1 else wanted
        scores = request.in_progress_prompt_logprobs_cpu
        if scores is None:
            scores = LogprobsTensors.empty_cpu(request.num_prompt_tokens - 1, num_logprobs + 1)
            request.in_progress_prompt_logprobs_cpu = scores
        start = request.num_computed_tokens
        remaining = request.num_prompt_tokens - 1 - start
        complete = num_scheduled > remaining
        num_rows = min(num_scheduled, remaining)
        piece = scored_piece_rows(vocab_size)
        for begin in range(0, num_rows, piece):
            end = min(begin + piece, num_rows)
            targets = torch.tensor(request.prompt_token_ids[start + 1 + begin : start + 1 + end])
            logits = chunk_logits(begin, end)
            if self._logprobs_mode in ("raw_logprobs", "processed_logprobs"):
                logits = self._sampler.compute_logprobs(logits)
            part = self._sampler.gather_logprobs(logits, num_logprobs, targets)
            rows = slice(start + begin, start + end)
            scores.logprob_token_ids[rows] = part.logprob_token_ids
            scores.logprobs[rows] = part.logprobs
            scores.selected_token_ranks[rows] = part.selected_token_ranks
        if not complete:
            return None
        request.in_progress_prompt_logprobs_cpu = None
        return scores
