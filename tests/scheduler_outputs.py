"""`SchedulerOutput`s as vLLM's scheduler makes them, written by hand."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput


@dataclass(frozen=True)
class Continued:
    """A request that the worker knows already."""

    name: str
    num_computed_tokens: int
    num_output_tokens: int = 0
    new_blocks: Sequence[int] | None = None
    resumed: bool = False
    """It was preempted; `new_blocks` are all its blocks."""
    all_token_ids: Sequence[int] | None = None
    """Sent for a request that was not in the previous step."""
    num_scheduled: int = 1


def new_request(
    name: str,
    prompt: Sequence[int],
    blocks: Sequence[int],
    num_computed_tokens: int = 0,
    **params,
) -> NewRequestData:
    """A request that the worker sees for the first time, greedy unless `params` says otherwise."""
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(prompt),
        mm_features=[],
        sampling_params=SamplingParams(**({"temperature": 0.0} | params)),
        pooling_params=None,
        block_ids=(list(blocks),),
        num_computed_tokens=num_computed_tokens,
        lora_request=None,
    )


def scheduler_output(
    new: Sequence[NewRequestData] = (),
    continued: Sequence[Continued] = (),
    finished: Sequence[str] = (),
    num_scheduled: dict[str, int] | None = None,
) -> SchedulerOutput:
    """One step; new requests compute their whole prompt unless `num_scheduled` says otherwise."""
    counts = {r.req_id: len(r.prompt_token_ids) - r.num_computed_tokens for r in new}
    counts |= {r.name: r.num_scheduled for r in continued}
    counts |= num_scheduled or {}
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = list(new)
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=[r.name for r in continued],
        resumed_req_ids={r.name for r in continued if r.resumed},
        new_token_ids=[],
        all_token_ids={
            r.name: list(r.all_token_ids) for r in continued if r.all_token_ids is not None
        },
        new_block_ids=[None if r.new_blocks is None else (list(r.new_blocks),) for r in continued],
        num_computed_tokens=[r.num_computed_tokens for r in continued],
        num_output_tokens=[r.num_output_tokens for r in continued],
    )
    output.num_scheduled_tokens = counts
    output.total_num_scheduled_tokens = sum(counts.values())
    output.finished_req_ids = set(finished)
    return output
