"""vLLM's schedulers, which also end a request whose logits are not finite.

The worker names such a request in `ModelRunnerOutput.num_nans_in_logits`, vLLM's own field for it,
and samples nothing for it. vLLM itself only counts these requests, or stops the engine. Here the
request ends with vLLM's finish reason "error", which its front ends turn into an HTTP error, and
the other requests go on.
"""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger("vllm.metal.scheduler")


class _EndsRequestsWithNaNs(Scheduler):
    """The part that both schedulers share."""

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for req_id, count in (model_runner_output.num_nans_in_logits or {}).items():
            if count:
                self._end(req_id, count, outputs)
        return outputs

    def _end(self, req_id: str, count: int, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Ends a request, unless it has ended meanwhile, and adds that to what clients are told."""
        request = self.requests.get(req_id)
        if request is None or request.is_finished():
            return
        # What it has written may be wrong, and must not be given to other requests.
        block_ids = self.kv_cache_manager.get_block_ids(req_id)
        self.kv_cache_manager.evict_blocks({block for group in block_ids for block in group})
        self.finish_requests(req_id, RequestStatus.FINISHED_ERROR)
        logger.error(
            "Request %s ends with an error after %d tokens: its logits are not finite. The model's "
            "weights may be damaged, or overflow in this --dtype",
            req_id,
            request.num_output_tokens,
        )
        client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
        client.outputs.append(
            EngineCoreOutput(
                request_id=req_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
                num_nans_in_logits=count,
            )
        )


class MetalScheduler(_EndsRequestsWithNaNs):
    """For synchronous steps."""


class AsyncMetalScheduler(_EndsRequestsWithNaNs, AsyncScheduler):
    """For steps that are scheduled one ahead."""
