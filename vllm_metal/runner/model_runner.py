"""One step of the engine: scheduled requests in, sampled tokens out.

    execute_model   batch.update -> decode rows as one (B, 1) -> prompt chunks, each (1, L)
    sample_tokens   logits -> tokens

The order of the forward passes is one of dependence. vLLM offers a block to other requests as soon
as its last token is scheduled, so a request that joins may read what others write in this very
step. Requests that go on decoding read nothing but what earlier steps wrote: they come first.
Prompt chunks follow in the scheduler's order, in which whoever fills a block precedes whoever was
given it.

A greedy step is handed back before MLX has computed it (`PendingTokens`): vLLM schedules the next
step meanwhile, and its graph is built on the lazy tokens. `steps_in_flight` and `kv_cache/cache.py`
say when it is dispatched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import torch
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    KVConnectorOutput,
    LogprobsTensors,
    ModelRunnerOutput,
)
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.kv_store.transfers import PageTransfers
from vllm_metal.model.model_binding import BoundModel, RowLogits
from vllm_metal.runner import forward_inputs
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.dispatch import Dispatch
from vllm_metal.runner.nan_logits import are_finite, reporter, rows_in_torch
from vllm_metal.runner.pending_tokens import PendingTokens
from vllm_metal.runner.request_batch import PLACEHOLDER, RequestBatch
from vllm_metal.runner.sampler import TorchSampler, greedy, to_torch
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
    logits: dict[int, mx.array] = field(default_factory=dict)
    """Row of the batch -> its logits [1, vocabulary], of rows that sample."""
    decode_rows: list[int] = field(default_factory=list)
    decode_logits: mx.array | None = None
    """[B, vocabulary], rows as in `decode_rows`."""
    prompt_logprobs: dict[str, LogprobsTensors | None] = field(default_factory=dict)
    prompts_with_nans: list[str] = field(default_factory=list)
    """Requests whose prompt logprobs are asked for and cannot be computed."""


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
        step = _Step(scheduled, transferred)
        chunks = []
        for req_id, num_scheduled in scheduled.num_scheduled_tokens.items():
            row = self.batch.rows.req_id_to_index[req_id]
            if self.batch.decodes(req_id, scheduled):
                step.decode_rows.append(row)
            else:
                chunks.append((req_id, row, num_scheduled))
        if step.decode_rows:
            step.decode_logits = self._decode(step, pending)
            if chunks:  # then nothing is in flight: no chunk runs ahead
                self.kv_cache.evaluate(step.decode_logits)
        for chunk in chunks:
            self._prefill(step, *chunk)
        self._step = step
        return None

    def sample_tokens(
        self, grammar: "GrammarOutput | None"
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Samples one token for every request whose known tokens are all computed."""
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
            return self._sample_in_torch(step, grammar, output)
        return self._sample_in_mlx(step, output)

    def close(self) -> None:
        """Ends the steps in flight, and writes to disk what is kept there."""
        self._in_flight.finish()
        if self._transfers is not None:
            self._transfers.close()

    def _can_run_ahead(self, scheduled: "SchedulerOutput") -> bool:
        """Whether this step needs no token of the previous one on the host.

        So it is when every request was in the previous step and advances by one token. The
        batch as it was decides: what joins now is in `scheduled_new_reqs`. A forward that
        evaluates on its way waits for the previous one.
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

    def _prefill(self, step: _Step, req_id: str, row: int, num_scheduled: int) -> None:
        """One prompt chunk; evaluated at once, since each write of pages wants its own turn."""
        token_ids, metadata = forward_inputs.prefill_inputs(
            self.batch.rows, row, num_scheduled, self.kv_cache.groups
        )
        if req_id in self.batch.unscored_prompts:
            chunk = self.bound_model.forward_to_head(token_ids, metadata)
            self.kv_cache.evaluate(chunk.hidden)
            logits = chunk.of(num_scheduled - 1, num_scheduled)
            self._score_prompt(step, req_id, num_scheduled, chunk)
        else:
            logits = self.bound_model.forward(token_ids, metadata).squeeze(0)
        if self.batch.is_complete(req_id, num_scheduled):
            step.logits[row] = logits[-1:]
            self.kv_cache.evaluate(step.logits[row])
        else:
            del logits  # what is not computed still holds arrays that are written next
            self.kv_cache.evaluate()

    def _decode(self, step: _Step, pending: PendingTokens | None) -> mx.array:
        """Logits [B, vocabulary] of the decode rows, lazily where the rows run as one forward.

        Leaves `step.decode_rows` in the order of the logits.
        """
        rows, groups = self.batch.rows, self.kv_cache.groups
        step.decode_rows.sort()
        parts = self.decode.parts(rows, step.decode_rows, groups)
        logits = []
        for part in parts:
            token_ids, metadata = forward_inputs.decode_inputs(
                rows, part, groups, (pending.tokens, pending.index) if pending else None
            )
            logits.append(self.decode.run(token_ids, metadata)[:, -1])
            if len(parts) > 1 or self.kv_cache.shares_arrays:
                self._in_flight.finish()
                self.kv_cache.evaluate(logits[-1])
        step.decode_rows = [row for part in parts for row in part]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits)

    def _sample_in_mlx(
        self, step: _Step, output: ModelRunnerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        rows = self.batch.rows
        parts, sampled = [], []
        if step.decode_logits is not None:
            parts.append(step.decode_logits)
            sampled += [rows.req_ids[row] for row in step.decode_rows]
        for row, logits in step.logits.items():
            parts.append(logits)
            sampled.append(rows.req_ids[row])
        if not parts:
            output.sampled_token_ids = [[] for _ in output.req_ids]
            self._report_nans(output, step.prompts_with_nans)
            return output
        logits = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        tokens, finite = greedy(logits), are_finite(logits)
        positions = {
            req_id: self.batch.append(req_id, PLACEHOLDER)
            for req_id in sampled
            if self._samples(step, req_id)
        }
        if len(positions) < len(sampled):
            chosen = mx.array([i for i, r in enumerate(sampled) if r in positions])
            tokens, finite = tokens[chosen], finite[chosen]
        if not self.kv_cache.stores_through:
            self._in_flight.finish()
        wait = self._dispatch(tokens, finite, self.kv_cache.arrays)
        pending = PendingTokens(
            tokens, finite, wait, positions, output, step.prompts_with_nans, self._report_nans
        )
        self._in_flight.add(pending)
        if self._returns_pending:
            return pending
        self._in_flight.finish()
        return pending.get_output()

    def _sample_in_torch(
        self, step: _Step, grammar: "GrammarOutput | None", output: ModelRunnerOutput
    ) -> ModelRunnerOutput:
        rows = self.batch.rows
        self._in_flight.finish()
        parts = [([row], logits) for row, logits in step.logits.items()]
        if step.decode_logits is not None:
            parts.append((step.decode_rows, step.decode_logits))
        logits, with_nans = rows_in_torch(parts, rows, self.kv_cache.evaluate)
        with_nans += step.prompts_with_nans
        if grammar is not None:
            apply_grammar_bitmask(step.scheduled, grammar, rows, logits)
        incomplete = [
            row
            for row, req_id in enumerate(rows.req_ids)
            if req_id in with_nans or not self._samples(step, req_id)
        ]
        sampled = self._sampler.sample(logits, rows, incomplete)
        output.sampled_token_ids = sampled.sampled_token_ids.tolist()
        for row in incomplete:
            output.sampled_token_ids[row] = []
        if sampled.logprobs_tensors is not None:
            output.logprobs = sampled.logprobs_tensors.tolists()
        for req_id, token_ids in zip(output.req_ids, output.sampled_token_ids, strict=True):
            for token_id in token_ids:
                self.batch.append(req_id, token_id)
        self._report_nans(output, with_nans)
        return output

    def _samples(self, step: _Step, req_id: str) -> bool:
        return self.batch.is_complete(req_id, step.scheduled.num_scheduled_tokens[req_id])

    def _score_prompt(self, step: _Step, req_id: str, num_scheduled: int, chunk: RowLogits) -> None:
        """Scores a prompt chunk, whose last row must be finite, too, for its scores to count."""
        finite: list[bool] = []

        def piece(begin: int, end: int) -> torch.Tensor:
            logits = chunk.of(begin, end)
            finite.append(bool(mx.all(are_finite(logits)).item()))
            return to_torch(logits)

        piece(num_scheduled - 1, num_scheduled)
        scores = self._sampler.score_prompt(
            self.batch.requests[req_id],
            num_scheduled,
            self.batch.rows.vocab_size,
            piece,
        )
        if not all(finite):
            step.prompts_with_nans.append(req_id)
        elif scores is not None:
            step.prompt_logprobs[req_id] = scores
            self.batch.unscored_prompts.discard(req_id)
