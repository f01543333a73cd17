"""One step of the engine: scheduled requests in, sampled tokens out.

    execute_model         batch.update -> segments -> those that decode as one (T, 1)
                                                   -> prompt chunks, each (1, L)
    sample_tokens         logits -> tokens
    take_draft_token_ids  tokens -> drafts, which the scheduler adds to the next step

The order of the forward passes is one of dependence. vLLM offers a block to other requests as soon
as its last token is scheduled, so a request that joins may read what others write in this very
step. Requests that go on decoding read nothing but what earlier steps wrote: they come first.
Prompt chunks follow in the scheduler's order, in which whoever fills a block precedes whoever was
given it.

A greedy step stays in MLX and is handed back before it is computed (`PendingTokens`): vLLM
schedules the next step and its graph is built on the lazy tokens meanwhile. Where kernels write all
pages, that step is dispatched at once (`steps_in_flight`). Elsewhere it is dispatched when the
previous step is finished, so that every page array has one holder and is written in place
(`kv_cache/cache.py`). With drafts nothing is handed back early: how far a step has come is known
when its tokens are, so vLLM schedules the next one then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    DraftTokenIds,
    KVConnectorOutput,
    LogprobsTensors,
    ModelRunnerOutput,
)
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.kv_store.transfers import PageTransfers
from vllm_metal.model.model_binding import BoundModel, RowLogits
from vllm_metal.runner import forward_inputs
from vllm_metal.runner.acceptance import Gains, greedy_gains, sampled_gains
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.dispatch import Dispatch
from vllm_metal.runner.nan_logits import are_finite, reporter, rows_in_torch
from vllm_metal.runner.pending_tokens import PendingTokens
from vllm_metal.runner.prompt_scores import score_chunk
from vllm_metal.runner.proposers import make_proposer
from vllm_metal.runner.request_batch import PLACEHOLDER, RequestBatch
from vllm_metal.runner.sampler import TorchSampler, greedy
from vllm_metal.runner.segments import Kind, Segment
from vllm_metal.runner.steps_in_flight import StepsInFlight

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


@dataclass
class _Step:
    """The state that `execute_model` leaves for `sample_tokens`."""

    scheduled: "SchedulerOutput"
    transferred: KVConnectorOutput | None = None
    """What vLLM's scheduler is told about pages on disk."""
    logits: list[tuple[list[Segment], mx.array]] = field(default_factory=list)
    """Of each forward pass: its segments, and the logits [.., vocabulary] of their positions that
    sample. A segment that decodes and does not sample has one row."""
    prompt_logprobs: dict[str, LogprobsTensors | None] = field(default_factory=dict)
    prompts_with_nans: list[str] = field(default_factory=list)
    """Requests whose prompt logprobs are asked for and cannot be computed."""

    @property
    def segments(self) -> list[Segment]:
        """In the order of the logits."""
        return [segment for segments, _ in self.logits for segment in segments]


class ModelRunner:
    """Runs the bound model for vLLM's scheduler.

    Args:
        vllm_config: vLLM's configuration.
        model: the model over its pages.
        decode: how it decodes.
        block_tables: sizes for each KV group.
        dispatch: starts the evaluation of a step.
        transfers: keeps pages on disk; None where none are kept.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        model: BoundModel,
        decode: DecodeForward,
        block_tables: Sequence[BlockTableSize],
        dispatch: Dispatch,
        transfers: PageTransfers | None = None,
    ):
        self.bound_model = model  # not `model`: there vLLM expects a torch module
        self.kv_cache = model.kv_cache
        self.decode = decode
        self.batch = RequestBatch(vllm_config, block_tables)
        self._returns_pending = vllm_config.scheduler_config.async_scheduling
        config = vllm_config.model_config
        self._sampler = TorchSampler(config.logprobs_mode, config.use_fp64_gumbel)
        self._dispatch = dispatch
        self._transfers = transfers
        self._report_nans = reporter(vllm_config, transfers.discard if transfers else None)
        self._in_flight = StepsInFlight(self.batch)
        self._step: _Step | None = None
        self._proposer = make_proposer(vllm_config)
        self._newest: ModelRunnerOutput | None = None
        """Of the last step, where a proposer goes on from it."""

    def execute_model(self, scheduled: "SchedulerOutput") -> ModelRunnerOutput | None:
        """Runs the forward passes of one step; `sample_tokens` follows unless it was empty."""
        self._in_flight.finish(but=1)
        if not self._can_run_ahead(scheduled):
            self._in_flight.finish()
        transferred = None
        if self._transfers is not None:
            transferred = self._transfers.begin_step(scheduled, self._in_flight.finish)
        pending = self._in_flight.newest
        self.batch.update(scheduled)
        if scheduled.kv_cache_block_copies:
            self._in_flight.finish()
            self.kv_cache.copy_blocks(scheduled.kv_cache_block_copies)
        if not scheduled.total_num_scheduled_tokens:
            return ModelRunnerOutput.with_kv_conn_output_only(transferred)
        step, segments = _Step(scheduled, transferred), self.batch.segments(scheduled)
        decodes = [segment for segment in segments if segment.kind is Kind.DECODE]
        chunks = [segment for segment in segments if segment.kind is Kind.CHUNK]
        if decodes:
            self._decode(step, decodes, pending)
            if chunks:  # then nothing is in flight: no chunk runs ahead
                self.kv_cache.evaluate(*(logits for _, logits in step.logits))
        for chunk in chunks:
            self._prefill(step, chunk)
        self._step = step
        return None

    def sample_tokens(
        self, grammar: "GrammarOutput | None"
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Samples for every request whose known tokens are all computed (`acceptance`)."""
        step, self._step = self._step, None
        if step is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        output = ModelRunnerOutput(
            req_ids=list(self.batch.rows.req_ids),
            req_id_to_index=dict(self.batch.rows.req_id_to_index),
            prompt_logprobs_dict=step.prompt_logprobs,
            kv_connector_output=step.transferred,
        )
        if self.batch.samples_in_torch or grammar is not None:
            gains = self._sample_in_torch(step, grammar)
        elif not step.logits:
            gains = Gains({}, [])
        elif self._returns_pending:
            return self._sample_ahead(step, output)
        else:
            gains = self._sample_in_mlx(step)
        for req_id in step.prompts_with_nans:
            gains.tokens.pop(req_id, None)
        output.sampled_token_ids = [gains.tokens.get(req_id, []) for req_id in output.req_ids]
        output.logprobs = gains.logprobs
        self._report_nans(output, gains.with_nans + step.prompts_with_nans)
        self._newest = output
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts of the tokens that follow the last step's; None where nothing is proposed."""
        newest, self._newest = self._newest, None
        if self._proposer is None or newest is None:
            return None
        drafts = self._proposer.propose(self.batch, newest.sampled_token_ids)
        return DraftTokenIds(newest.req_ids, drafts)

    def close(self) -> None:
        """Ends the steps in flight, and writes to disk what is kept there."""
        self._in_flight.finish()
        if self._transfers is not None:
            self._transfers.close()

    # Forward passes, in the order of a step.

    def _can_run_ahead(self, scheduled: "SchedulerOutput") -> bool:
        """Whether this step needs no token of the previous one on the host.

        So it is when every request was in the previous step and advances by one token; what joins
        now is in `scheduled_new_reqs`. A forward that evaluates on its way waits.
        """
        cached, previous = scheduled.scheduled_cached_reqs, self._in_flight.newest
        return (
            previous is not None
            and not self.kv_cache.shares_arrays
            and not scheduled.scheduled_new_reqs
            and not cached.resumed_req_ids
            and all(req_id in previous.index for req_id in cached.req_ids)
            and all(count == 1 for count in scheduled.num_scheduled_tokens.values())
        )

    def _prefill(self, step: _Step, segment: Segment) -> None:
        """One prompt chunk; evaluated at once, since each write of pages wants its own turn."""
        req_id, num_scheduled = segment.req_id, segment.length
        token_ids, metadata = forward_inputs.prefill_inputs(
            self.batch.rows, segment.row, num_scheduled, self.kv_cache.groups
        )
        if req_id in self.batch.unscored_prompts:
            chunk = self.bound_model.forward_to_head(token_ids, metadata)
            self.kv_cache.evaluate(chunk.hidden)
            logits = chunk.of(num_scheduled - 1, num_scheduled)
            self._score_prompt(step, req_id, num_scheduled, chunk)
        else:
            logits = self.bound_model.forward(token_ids, metadata).squeeze(0)
        if segment.samples:
            step.logits.append(([segment], logits[-1:]))
            self.kv_cache.evaluate(step.logits[-1][1])
        else:
            del logits  # what is not computed still holds arrays that are written next
            self.kv_cache.evaluate()

    def _decode(self, step: _Step, segments: list[Segment], pending: PendingTokens | None) -> None:
        """The segments that decode: lazily where they run as one forward pass."""
        rows, groups = self.batch.rows, self.kv_cache.groups
        for part in (parts := self.decode.parts(segments, groups)):
            token_ids, metadata = forward_inputs.decode_inputs(
                rows, part, groups, (pending.tokens, pending.index) if pending else None
            )
            logits = self.decode.run(token_ids, metadata)[:, -1]
            step.logits.append((part, logits))
            if len(parts) > 1 or self.kv_cache.shares_arrays:
                self._in_flight.finish()
                self.kv_cache.evaluate(logits)

    # Sampling.

    def _most_likely(self, step: _Step) -> tuple[list[Segment], mx.array, mx.array]:
        """Segments that sample, and of all their sampled positions the most likely token and
        whether one can be chosen, lazily."""
        parts, segments = [logits for _, logits in step.logits], step.segments
        logits = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        tokens, finite = greedy(logits), are_finite(logits)
        if not all(segment.samples for segment in segments):
            rows = (segment.samples for segment in segments for _ in range(segment.num_rows))
            chosen = mx.array([row for row, samples in enumerate(rows) if samples], mx.int32)
            tokens, finite = tokens[chosen], finite[chosen]
        return [segment for segment in segments if segment.samples], tokens, finite

    def _sample_ahead(self, step: _Step, output: ModelRunnerOutput) -> PendingTokens:
        """Starts the evaluation, and leaves a placeholder for the token of each request."""
        segments, tokens, finite = self._most_likely(step)
        positions = {s.req_id: self.batch.append(s.req_id, PLACEHOLDER) for s in segments}
        if not self.kv_cache.stores_through:
            self._in_flight.finish()
        wait = self._dispatch(tokens, finite, self.kv_cache.arrays)
        pending = PendingTokens(
            tokens, finite, wait, positions, output, step.prompts_with_nans, self._report_nans
        )
        self._in_flight.add(pending)
        return pending

    def _sample_in_mlx(self, step: _Step) -> Gains:
        segments, tokens, finite = self._most_likely(step)
        self._dispatch(tokens, finite, self.kv_cache.arrays)()
        gains = greedy_gains(segments, np.array(tokens).tolist(), np.array(finite).tolist())
        for req_id, token_ids in gains.tokens.items():
            for token_id in token_ids:
                self.batch.append(req_id, token_id)
        return gains

    def _sample_in_torch(self, step: _Step, grammar: "GrammarOutput | None") -> Gains:
        self._in_flight.finish()
        rows = self.batch.rows
        given = step.scheduled.scheduled_spec_decode_tokens
        counts = [1 + len(given.get(req_id, ())) for req_id in rows.req_ids]
        ends = np.cumsum(counts)  # one row of each request, and one of each draft, as vLLM has them
        first_rows = ends - counts
        parts = [
            ([first_rows[s.row] + i for s in segments for i in range(s.num_rows)], logits)
            for segments, logits in step.logits
        ]
        shape = int(ends[-1]), rows.vocab_size
        logits, finite = rows_in_torch(parts, shape, self.kv_cache.evaluate)
        if grammar is not None:
            apply_grammar_bitmask(step.scheduled, grammar, rows, logits)
        sampling = [segment for segment in step.segments if segment.samples]
        return sampled_gains(sampling, first_rows, logits, finite, self.batch, self._sampler)

    def _score_prompt(self, step: _Step, req_id: str, num_scheduled: int, chunk: RowLogits) -> None:
        request, vocab_size = self.batch.requests[req_id], self.batch.rows.vocab_size
        scores, finite = score_chunk(self._sampler, request, num_scheduled, vocab_size, chunk)
        if not finite:
            step.prompts_with_nans.append(req_id)
        elif scores is not None:
            step.prompt_logprobs[req_id] = scores
            self.batch.unscored_prompts.discard(req_id)
