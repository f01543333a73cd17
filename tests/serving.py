"""The worker under vLLM's own scheduler, without an engine: a step is one function call."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_metal.worker import MetalWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def loaded_worker(config: "VllmConfig") -> MetalWorker:
    """A worker as vLLM has it when it asks for the memory."""
    worker = MetalWorker(config, 0, 0, "", is_driver_worker=True)
    worker.init_device()
    worker.load_model()
    [layout] = worker.get_supported_kv_cache_layouts()
    worker.set_kv_cache_layout(layout)
    return worker


class Serving:
    """Worker and scheduler, set up in the order in which vLLM's engine does it.

    With asynchronous scheduling one step is scheduled and run ahead, as the engine does.
    """

    def __init__(self, config: "VllmConfig"):
        self.worker = MetalWorker(config, 0, 0, "", is_driver_worker=True)
        self.worker.init_device()
        self.worker.load_model()
        specs = self.worker.get_kv_cache_spec()
        layouts = self.worker.get_supported_kv_cache_layouts()
        resolve_kv_cache_layout(config, [layouts], list(specs.values()))
        available = self.worker.determine_available_memory()
        [planned] = get_kv_cache_configs(config, [specs], [available])
        self.worker.initialize_from_config(planned)
        self.worker.compile_or_warm_up_model()
        self._start_scheduler(config, planned)

    def _start_scheduler(self, config: "VllmConfig", planned: "KVCacheConfig") -> None:
        """vLLM's scheduler over the planned blocks, as the engine's core sets it up."""
        planned = generate_scheduler_kv_cache_config([planned])
        config.cache_config.num_gpu_blocks = planned.num_blocks
        config.cache_config.block_size = min(
            group.kv_cache_spec.block_size for group in planned.kv_cache_groups
        )
        block_size, hash_block_size = resolve_kv_cache_block_sizes(planned, config)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=planned,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(hash_block_size, hash_function)
        self._ahead = 1 if config.scheduler_config.async_scheduling else 0
        self._in_flight: deque = deque()
        self.outputs: list[ModelRunnerOutput] = []
        self.num_preemptions = 0
        self.cached_tokens: dict[str, int] = {}
        """Prompt tokens that a request took from the prefix cache, by name."""

    @property
    def runner(self):
        return self.worker.model_runner

    def add(self, name: str, prompt: Sequence[int], **params) -> Request:
        """Submits a request, greedy unless `params` says otherwise."""
        request = Request(
            name,
            list(prompt),
            SamplingParams(**(GREEDY | params)),
            None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        """Schedules and runs one step, and gives the scheduler the oldest finished result."""
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.num_preemptions += len(scheduled.preempted_req_ids or ())
            for new in scheduled.scheduled_new_reqs:
                self.cached_tokens[new.req_id] = new.num_computed_tokens
            output = self.worker.execute_model(scheduled)
            if output is None:
                output = self.worker.sample_tokens(self.scheduler.get_grammar_bitmask(scheduled))
            self._in_flight.append((scheduled, output))
        if len(self._in_flight) > self._ahead or (
            self._in_flight and not self.scheduler.has_requests()
        ):
            self._deliver()

    def run(self, each_step: Callable[[], None] = lambda: None) -> None:
        """Steps until every request is finished."""
        for _ in range(1000):
            if not self._in_flight and not self.scheduler.has_unfinished_requests():
                return
            self.step()
            each_step()
        raise AssertionError("requests do not finish")

    def generate(self, prompts: Sequence[Sequence[int]], **params) -> list[list[int]]:
        """Output tokens of prompts submitted together."""
        first = len(self.outputs)
        requests = [
            self.add(f"request-{first}-{i}", prompt, **params) for i, prompt in enumerate(prompts)
        ]
        self.run()
        return [list(request.output_token_ids) for request in requests]

    def _deliver(self) -> None:
        scheduled, output = self._in_flight.popleft()
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        self.outputs.append(output)
        self.scheduler.update_from_output(scheduled, output)
        if not self._ahead and (drafts := self.worker.take_draft_token_ids()) is not None:
            self.scheduler.update_draft_token_ids(drafts)
