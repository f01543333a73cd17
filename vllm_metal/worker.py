"""vLLM's worker: device, model, memory question, pages; the steps are the model runner's."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx
import torch
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_metal.attention.backend import ChunkMemory
from vllm_metal.config import parse
from vllm_metal.errors import user_errors_end_child_process
from vllm_metal.kv_cache import planner, remedies
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import gathered_tokens
from vllm_metal.kv_cache.remedies import MemorySettings
from vllm_metal.kv_cache.spec import KV_CACHE_LAYOUT, block_table_sizes, cache_layout
from vllm_metal.kv_cache.workspace import StepMemory, most_decode_rows, scoring_bytes
from vllm_metal.kv_store.connector import handshake, make_transfers
from vllm_metal.machine.blas import load_fast_blas
from vllm_metal.machine.cache_folder import startup_cache_folder
from vllm_metal.machine.device import Device, select_device
from vllm_metal.metal_kernel_backend.turboquant import presets
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.model import model_loader
from vllm_metal.model.model_binding import BoundModel, ModelBinding
from vllm_metal.model_pages import ModelPages
from vllm_metal.options import speculation
from vllm_metal.runner.decode_forward import DecodeForward
from vllm_metal.runner.dispatch import make_dispatch
from vllm_metal.runner.model_runner import ModelRunner
from vllm_metal.runner.steps_in_flight import MAX_STEPS
from vllm_metal.startup import compression, decode_probe, dependencies, workspace_probe
from vllm_metal.startup.crash_marker import CrashMarker
from vllm_metal.startup.probe_requests import prompts_of
from vllm_metal.startup.prompt_beginning import Encode
from vllm_metal.startup.result_cache import (
    DECODE_ANSWERS,
    FORWARD_PEAKS,
    ResultCache,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput

logger = init_logger("vllm.metal.worker")


class MetalWorker(WorkerBase):
    """One process, one MLX device. vLLM calls the methods in the order they stand here."""

    model_runner: ModelRunner  # type: ignore[assignment]  # vLLM knows runners that are torch modules

    @user_errors_end_child_process()
    def init_device(self) -> None:
        self.device = torch.device("cpu")
        set_random_seed(self.model_config.seed)
        self.metal_device: Device = select_device()
        mx.set_memory_limit(self.metal_device.memory_limit)  # an earlier worker set it to its plan
        logger.info("MLX device: %s (%s)", self.metal_device.name, self.metal_device.kind)
        if self.metal_device.kind == "cpu":
            logger.info("BLAS for MLX: %s", load_fast_blas())

    @user_errors_end_child_process()
    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        config = self.model_config
        source = model_loader.ModelSource.of(config)
        folder = model_loader.model_folder(source.model, source.revision)
        self._of_server = depends_on = dependencies.of_server(
            folder, source.config().written, config.dtype, self.metal_device
        )
        kept = startup_cache_folder()
        self.results = ResultCache(kept, depends_on)
        self._tracing = CrashMarker(kept and kept.with_name("tracing"), depends_on)
        model = model_loader.load_model(
            replace(source, model=str(folder)), config.dtype, max_model_len=config.max_model_len
        )
        self.weights = model_loader.weight_bytes(model)
        self.binding = ModelBinding(model)
        self.model_pages = self._make_cache()
        # vLLM's scheduler has the same object, and reads it when it is made.
        self.cache_config.prefix_match_unit = self.model_pages.match_unit
        self._prompts = prompts_of(self.model_config)
        self.decode_answers = self.results.get(
            DECODE_ANSWERS,
            dependencies.of_decode_answers(self._prompts),
            lambda: decode_probe.ask(self.binding, self._prompts, self._tracing),
        )
        if not self.decode_answers.batched.holds:
            speculation.require_batches(self.vllm_config, self.decode_answers.batched.reason)
        if not self.binding.slices_before_head:
            logger.info("The language-model head runs on every row of a prefill chunk")

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [KV_CACHE_LAYOUT]

    def get_kv_cache_spec(self) -> "dict[str, KVCacheSpec]":
        return self.model_pages.specs(self.model_config.max_model_len)

    @user_errors_end_child_process()
    def determine_available_memory(self) -> int:
        """Bytes for pages; nothing is kept."""
        settings = MemorySettings.of(self.vllm_config)
        steps = self._measure_steps()
        if self.results.read:
            results = " and ".join(self.results.read).replace("_", " ")
            logger.info("Read from %s, not measured anew: %s", self.results.folder, results)
        self.step_memory = steps(settings)
        plan_of = remedies.plan_of(
            self.metal_device, self.weights, steps, self.model_pages.capacity
        )
        self.plan = remedies.require(settings, plan_of)
        return self.plan.page_bytes

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        cache, max_model_len = self.model_pages, self.model_config.max_model_len
        num_blocks, layout = kv_cache_config.num_blocks, cache_layout(kv_cache_config)
        self.kv_cache = KVCache(cache.backends, num_blocks, cache.states, layout)
        mx.set_cache_limit(self.plan.workspace)
        mx.set_memory_limit(mx.get_active_memory() + self.plan.workspace)
        self._block_tables = block_table_sizes(self.vllm_config, kv_cache_config)
        self.transfers = make_transfers(self.vllm_config, self.kv_cache, self._of_server)
        # Graphs from here on belong to the stream that this sets.
        self._dispatch = make_dispatch(self.kv_cache.stores_through)
        logger.info(
            planner.report(
                self.plan,
                [backend.name for backend in cache.backends],
                cache.summary,
                cache.capacity(self.kv_cache.nbytes, max_model_len),
                cache.dense_capacity(self.kv_cache.nbytes, max_model_len),
                max_model_len,
            )
        )

    @user_errors_end_child_process()
    def compile_or_warm_up_model(self) -> CompilationTimes:
        model = self.binding.bind(self.kv_cache)
        most_tokens = self.step_memory.decode_tokens(self.plan.workspace)
        decode = self._decode_forward(model, most_tokens)
        self.model_runner = ModelRunner(
            self.vllm_config, model, decode, self._block_tables, self._dispatch, self.transfers
        )
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def execute_model(self, scheduler_output: "SchedulerOutput") -> "ModelRunnerOutput | None":
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(
        self, grammar_output: "GrammarOutput | None"
    ) -> "ModelRunnerOutput | AsyncModelRunnerOutput":
        return self.model_runner.sample_tokens(grammar_output)

    def take_draft_token_ids(self) -> "DraftTokenIds | None":
        return self.model_runner.take_draft_token_ids()

    def supports_draft_weight_updates(self) -> bool:
        return False

    def reset_mm_cache(self) -> None:
        """No multi-modal inputs are cached."""

    def reset_encoder_cache(self) -> None:
        """No encoder outputs are cached."""

    def list_loras(self) -> set[int]:
        return set()

    def get_kv_connector_handshake_metadata(self) -> dict | None:
        """What the scheduler's half of the store of pages needs; None where there is none."""
        return handshake(self.transfers)

    def sleep(self, level: int = 1) -> None:
        """Lets requests wait, as vLLM's scheduler has begun to; no memory is freed."""
        mx.clear_cache()
        logger.warning("Asleep until /wake_up: requests wait. Weights and pages keep their memory")

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing was given away."""

    def shutdown(self) -> None:
        if getattr(self, "model_runner", None) is not None:  # a start that fails has none
            self.model_runner.close()
        self.model_runner = None  # type: ignore[assignment]

    def _make_cache(self) -> ModelPages:
        turboquant = parse(self.vllm_config.additional_config, self.cache_config.cache_dtype)
        if turboquant is not None:
            sizes = [layer.head_size for layer in self.binding.layers]
            text = presets.describe(turboquant, self.model_config.model, *sizes[:1])
            logger.info("TurboQuant %s", text)
        binding, constants = self.binding, cache(self._calibrate)
        pages = ModelPages.of(self.vllm_config, binding.layers, binding.states, constants)
        if turboquant is not None:
            self._check_loss(turboquant, constants())
        return pages

    def _calibrate(self) -> list[KeyConstants]:
        encode, length = self._encode, self.model_config.max_model_len
        return compression.key_constants(self.binding, encode, length, self.results)

    def _check_loss(self, turboquant: TurboQuantConfig, constants: list[KeyConstants]) -> None:
        served = self.vllm_config, self.binding, self._encode, constants
        compression.check_loss(*served, turboquant, self.results)

    @property
    def _encode(self) -> Encode:
        return cached_tokenizer_from_config(self.model_config).encode

    def _decode_forward(self, model: BoundModel, most_tokens: int) -> DecodeForward:
        """How decode rows run, warm; logs why they do not run in the fastest way, if so."""
        started, name, answers = time.perf_counter(), model.binding.model_type, self.decode_answers
        if self.model_config.enforce_eager:
            answers = replace(answers, traced=decode_probe.Answer(False, "--enforce-eager"))
        step, traced = decode_probe.decode_step(model, self._prompts, answers, self._tracing)
        if traced.holds:
            logger.info("Decode is traced and replayed (%.1f s)", time.perf_counter() - started)
        elif answers.batched.holds:
            logger.info(
                "Decode of %s is not traced: %s. Its Python code runs in every step, which takes "
                "some milliseconds for a model of many layers",
                name,
                traced.reason,
            )
        else:
            logger.warning(
                "Decode of %s runs one request at a time: %s. A step of N requests takes about N "
                "times as long as a step of one",
                name,
                answers.batched.reason,
            )
        most_rows = self._decode_rows(self.scheduler_config.max_num_seqs)
        return DecodeForward(step, answers.batched.holds, most_tokens, most_rows)

    def _decode_rows(self, max_requests: int) -> int:
        return most_decode_rows(max_requests, self.vllm_config.num_speculative_tokens)

    def _measure_steps(self) -> Callable[[MemorySettings], StepMemory]:
        """Measures forward passes; gives what steps take beside weights and pages.

        The answer holds for this server's settings, and for the smaller ones that are tried where
        memory is too little.
        """
        binding, backends = self.binding, self.model_pages.backends
        scheduler, max_model_len = self.scheduler_config, self.model_config.max_model_len
        query_len = min(scheduler.max_num_batched_tokens, max_model_len)
        num_heads = self.model_config.get_num_attention_heads(self.parallel_config)
        max_rows = self._decode_rows(scheduler.max_num_seqs)
        model = binding.bind(KVCache(backends, workspace_probe.NUM_BLOCKS, binding.states))
        prefill, decode = self.results.get(
            FORWARD_PEAKS,
            dependencies.of_forward_peaks(self.vllm_config),
            lambda: (
                workspace_probe.prefill_peaks(model, query_len, max_model_len),
                workspace_probe.decode_peaks(model, max_rows, max_model_len),
            ),
        )
        groups = model.kv_cache.groups
        vocab_size = self.model_config.get_vocab_size()
        hidden_size = self.model_config.get_hidden_size()

        def steps(settings: MemorySettings) -> StepMemory:
            length = settings.max_model_len
            query_len = min(settings.max_num_batched_tokens, length)
            chunks = {b.chunk_memory(query_len, length, num_heads) for b in backends}
            return StepMemory(
                prefill,
                list(chunks) or [ChunkMemory(query_len, tokens=0, scored_rows=0)],
                decode,
                self._decode_rows(settings.max_num_seqs),
                max(1, gathered_tokens(groups, length)),
                scoring_bytes(query_len, vocab_size, hidden_size),
                MAX_STEPS if model.kv_cache.stores_through else 1,
            )

        return steps
