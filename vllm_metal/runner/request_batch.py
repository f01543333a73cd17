"""The requests of the running batch: vLLM's `InputBatch`, kept in step with the scheduler.

vLLM's own `InputBatch` holds token ids, block tables and the tensors that vLLM's sampler reads.
This file applies a `SchedulerOutput` to it, and writes sampled tokens back.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.sampling_params import SamplingType
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from vllm_metal.kv_cache.spec import BlockTableSize
from vllm_metal.runner.sampler import custom_processors, needs_torch
from vllm_metal.runner.segments import Kind, Segment

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

logger = init_logger("vllm.metal.sampling")

PLACEHOLDER = -1
"""Stands for a token that is sampled but not yet known on the host."""


class RequestBatch:
    """Requests known to the worker, and the rows of the batch that run this step."""

    def __init__(self, vllm_config: "VllmConfig", block_tables: Sequence[BlockTableSize]):
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        processors = build_logitsprocs(
            vllm_config, torch.device("cpu"), False, False, model.logits_processors or ()
        )
        custom = custom_processors(processors)
        if names := [type(p).__name__ for p in custom if not p.is_argmax_invariant()]:
            logger.info(
                "%s may change greedy tokens: vLLM's sampler samples every step in torch, and the "
                "next step is not prepared while MLX computes",
                ", ".join(names),
            )
        self.requests: dict[str, CachedRequestState] = {}
        self.unscored_prompts: set[str] = set()
        """Requests whose prompt logprobs are asked for and not complete."""
        self.rows = InputBatch(
            max_num_reqs=scheduler.max_num_seqs,
            max_model_len=model.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            device=torch.device("cpu"),
            vocab_size=model.get_vocab_size(),
            block_sizes=[table.block_size for table in block_tables],
            max_num_blocks_per_req=[table.num_blocks for table in block_tables],
            logitsprocs=processors,
            logitsprocs_need_output_token_ids=bool(custom),
            reasoning_config=vllm_config.reasoning_config,
        )

    @property
    def samples_in_torch(self) -> bool:
        """Whether a request of this batch needs vLLM's sampler rather than an argmax."""
        return needs_torch(self.rows.sampling_metadata)

    def update(self, scheduled: "SchedulerOutput") -> None:
        """Applies what the scheduler decided: finished, preempted, new and continued requests."""
        for req_id in scheduled.finished_req_ids:
            self.requests.pop(req_id, None)
            self.unscored_prompts.discard(req_id)
            self.rows.remove_request(req_id)
        running = scheduled.num_scheduled_tokens.keys()
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        for req_id in self.rows.req_id_to_index.keys() - (running - resumed):
            self.rows.remove_request(req_id)
        joining = [self._new_request(new) for new in scheduled.scheduled_new_reqs]
        joining += self._continue_requests(scheduled.scheduled_cached_reqs)
        for request in joining:
            self.rows.add_request(request)
        self.rows.condense()
        self.rows.refresh_metadata()

    def segments(self, scheduled: "SchedulerOutput") -> list[Segment]:
        """What this step computes of each request, in the scheduler's order.

        A request decodes if it goes on with one token after its prompt, and the drafts behind that.
        One that joins or rejoins in this step does not, however few tokens are left to compute: the
        blocks it was given may be written in this step. Its drafts are the scheduler's padding, -1,
        and are not computed.
        """
        return [self._segment(req_id, scheduled) for req_id in scheduled.num_scheduled_tokens]

    def _segment(self, req_id: str, scheduled: "SchedulerOutput") -> Segment:
        row = self.rows.req_id_to_index[req_id]
        first = int(self.rows.num_computed_tokens_cpu[row])
        given = scheduled.scheduled_spec_decode_tokens.get(req_id, ())
        known = scheduled.num_scheduled_tokens[req_id] - len(given)
        samples = self.is_complete(req_id, known)
        if (
            known == 1
            and first >= self.requests[req_id].num_prompt_tokens
            and req_id not in scheduled.scheduled_cached_reqs.resumed_req_ids
        ):
            drafts = tuple(takewhile(lambda token: token != PLACEHOLDER, given))
            return Segment(req_id, row, first, 1 + len(drafts), Kind.DECODE, samples, drafts)
        return Segment(req_id, row, first, known, Kind.CHUNK, samples)

    def is_complete(self, req_id: str, num_scheduled: int) -> bool:
        """Whether this step computes the last known token of the request, so that it samples."""
        row = self.rows.req_id_to_index[req_id]
        computed = int(self.rows.num_computed_tokens_cpu[row])
        return computed + num_scheduled >= self.rows.num_tokens_no_spec[row]

    def append(self, req_id: str, token_id: int) -> int:
        """Appends a sampled token, or `PLACEHOLDER`; returns its position in the request."""
        row = self.rows.req_id_to_index[req_id]
        position = int(self.rows.num_tokens_no_spec[row])
        self.rows.token_ids_cpu[row, position] = token_id
        self.rows.is_token_ids[row, position] = True
        self.rows.num_tokens_no_spec[row] = position + 1
        self.requests[req_id].output_token_ids.append(token_id)
        return position

    def fill_placeholder(self, req_id: str, position: int, token_id: int) -> None:
        """Puts the token that is now known where `append` left a placeholder."""
        request = self.requests.get(req_id)
        if request is None:
            return
        index = position - request.num_prompt_tokens
        if index < len(request.output_token_ids):
            request.output_token_ids[index] = token_id
        row = self.rows.req_id_to_index.get(req_id)
        if row is not None:
            self.rows.token_ids_cpu[row, position] = token_id

    def _new_request(self, new: "NewRequestData") -> CachedRequestState:
        params = new.sampling_params
        assert params is not None, "a request that generates nothing"  # the platform refuses them
        generator = None
        if params.sampling_type == SamplingType.RANDOM_SEED and params.seed is not None:
            generator = torch.Generator(device="cpu")
            generator.manual_seed(params.seed)
        if params.prompt_logprobs is not None:
            self.unscored_prompts.add(new.req_id)
        request = CachedRequestState(
            req_id=new.req_id,
            prompt_token_ids=new.prompt_token_ids,
            mm_features=new.mm_features,
            sampling_params=params,
            generator=generator,
            block_ids=new.block_ids,
            num_computed_tokens=new.num_computed_tokens,
            output_token_ids=[],
        )
        self.requests[new.req_id] = request
        return request

    def _continue_requests(self, cached: "CachedRequestData") -> list[CachedRequestState]:
        """Updates continued requests in place; returns those that have to rejoin the batch."""
        rejoining = []
        for i, req_id in enumerate(cached.req_ids):
            request = self.requests[req_id]
            request.num_computed_tokens = cached.num_computed_tokens[i]
            new_block_ids = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                assert new_block_ids is not None
                request.block_ids = new_block_ids
            elif new_block_ids is not None:
                for block_ids, new_ids in zip(request.block_ids, new_block_ids, strict=True):
                    block_ids.extend(new_ids)
            num_output_tokens = cached.num_output_tokens[i]
            row = self.rows.req_id_to_index.get(req_id)
            if row is None:
                self._recover_outputs(request, num_output_tokens, cached.all_token_ids)
                rejoining.append(request)
                continue
            self.rows.num_computed_tokens_cpu[row] = request.num_computed_tokens
            if new_block_ids is not None:
                self.rows.block_table.append_row(new_block_ids, row)
        return rejoining

    @staticmethod
    def _recover_outputs(
        request: CachedRequestState, num_output_tokens: int, all_token_ids: dict[str, list[int]]
    ) -> None:
        """A request that rejoins takes its outputs from the scheduler, which dropped some."""
        if request.req_id in all_token_ids and num_output_tokens:
            request.output_token_ids = all_token_ids[request.req_id][-num_output_tokens:]
        else:
            del request.output_token_ids[num_output_tokens:]
