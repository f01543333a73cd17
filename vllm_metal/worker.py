"""vLLM's worker: device, model, memory question, pages; the steps are the model runner's."""

import time
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_metal.blas import load_fast_blas

BLAS = load_fast_blas()
"""What serves MLX's matrix products on the CPU; settled before MLX is first imported."""

import mlx.core as mx  # noqa: E402

from vllm_metal import model_loader, quality, warm_up  # noqa: E402
from vllm_metal.attention.backend import AttentionBackend  # noqa: E402
from vllm_metal.attention.model_binding import ModelBinding  # noqa: E402
from vllm_metal.config import dense_dtype, parse  # noqa: E402
from vllm_metal.device import Device, select_device  # noqa: E402
from vllm_metal.errors import user_errors_end_child_process  # noqa: E402
from vllm_metal.key_samples import collect_key_samples  # noqa: E402
from vllm_metal.kv_cache import planner  # noqa: E402
from vllm_metal.kv_cache.cache import KVCache  # noqa: E402
from vllm_metal.kv_cache.capacity import CacheSummary, Capacity  # noqa: E402
from vllm_metal.kv_cache.spec import (  # noqa: E402
    block_table_lengths,
    cache_layout,
    capacity,
    kv_cache_specs,
)
from vllm_metal.metal_kernel_backend.selection import make_backends  # noqa: E402
from vllm_metal.metal_kernel_backend.turboquant.calibration import (  # noqa: E402
    KeyConstants,
    calibrate,
)
from vllm_metal.model_runner import ModelRunner  # noqa: E402

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

logger = init_logger("vllm.metal.worker")

KV_CACHE_LAYOUT = "LBNHC"
"""vLLM's name for one region per layer, block-major inside it."""


class MetalWorker(WorkerBase):
    """One process, one MLX device. vLLM calls the methods in the order they stand here."""

    @user_errors_end_child_process()
    def init_device(self) -> None:
        self.device = torch.device("cpu")
        self.metal_device: Device = select_device()
        logger.info("MLX device: %s (%s)", self.metal_device.name, self.metal_device.kind)
        if self.metal_device.kind == "cpu":
            logger.info("BLAS for MLX: %s", BLAS)

    @user_errors_end_child_process()
    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        config = self.model_config
        model = model_loader.load_model(
            config.model, config.dtype, config.revision, config.trust_remote_code
        )
        self.weights = model_loader.weight_bytes(model)
        self.binding = ModelBinding(model)
        self.backends = self._make_backends()
        if not self.binding.slices_before_head:
            logger.info("The language-model head runs on every row of a prefill chunk")

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [KV_CACHE_LAYOUT]

    def get_kv_cache_spec(self) -> "dict[str, KVCacheSpec]":
        return self._specs()

    @user_errors_end_child_process()
    def determine_available_memory(self) -> int:
        """Bytes for pages; nothing is kept."""
        cache = self.cache_config
        self.plan = planner.MemoryPlan(
            device=self.metal_device,
            utilization=cache.gpu_memory_utilization,
            weights=self.weights,
            workspace=self._measure_workspace(),
            requested_bytes=cache.kv_cache_memory_bytes,
        )
        if self.model_config.original_max_model_len != -1:
            self.plan.require(self.model_config.max_model_len, self._capacity(self.plan.page_bytes))
        return self.plan.page_bytes

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        layout = cache_layout(kv_cache_config)
        mx.set_cache_limit(self.plan.workspace)
        self.kv_cache = KVCache(
            self.backends, kv_cache_config.num_blocks, self.binding.states, layout
        )
        max_num_blocks = block_table_lengths(self.vllm_config, kv_cache_config)
        self.model_runner = ModelRunner(
            self.vllm_config, self.binding, self.kv_cache, max_num_blocks
        )
        logger.info(
            planner.report(
                self.plan,
                [backend.name for backend in self.backends],
                CacheSummary.of(self.backends),
                self._capacity(self.kv_cache.nbytes),
                self.model_config.max_model_len,
                self._dense_capacity(self.kv_cache.nbytes),
            )
        )

    @user_errors_end_child_process()
    def compile_or_warm_up_model(self) -> CompilationTimes:
        started, name = time.perf_counter(), self.binding.model_type
        batched = warm_up.takes_batched_offsets(self.binding, self.kv_cache)
        self.model_runner.batched_decode = batched
        if batched and (graphs := warm_up.traced_decode(self.binding, self.kv_cache)):
            self.model_runner.forward_decode = graphs
            logger.info("Decode is traced and replayed (%.1f s)", time.perf_counter() - started)
        elif batched:
            logger.info("%s cannot be traced: decode is built anew each step", name)
        else:
            logger.info("%s takes no array of positions: decode runs one request at a time", name)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def execute_model(self, scheduler_output: "SchedulerOutput") -> "ModelRunnerOutput | None":
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(
        self, grammar_output: "GrammarOutput | None"
    ) -> "ModelRunnerOutput | AsyncModelRunnerOutput":
        return self.model_runner.sample_tokens(grammar_output)

    def supports_draft_weight_updates(self) -> bool:
        return False

    def reset_mm_cache(self) -> None:
        """No multi-modal inputs are cached."""

    def reset_encoder_cache(self) -> None:
        """No encoder outputs are cached."""

    def list_loras(self) -> set[int]:
        return set()

    def shutdown(self) -> None:
        self.model_runner = None

    def _make_backends(self) -> list[AttentionBackend]:
        cache = self.cache_config
        turboquant = parse(self.vllm_config.additional_config, cache.cache_dtype)
        if turboquant is not None:
            self._tell_loss(turboquant.k_quant, turboquant.v_quant)
        dense = dense_dtype(cache.cache_dtype, self.model_config.dtype)
        return make_backends(
            self.binding.layers,
            cache.block_size,
            model_loader.mlx_dtype(dense),
            turboquant,
            self._calibrate,
            self.binding.states,
        )

    def _specs(self) -> "dict[str, KVCacheSpec]":
        model = self.model_config
        return kv_cache_specs(self.backends, model.dtype, self.binding.states, model.max_model_len)

    @staticmethod
    def _tell_loss(k_quant: str, v_quant: str) -> None:
        if text := quality.warning(k_quant, v_quant):
            logger.warning("TurboQuant: %s", text)
        elif loss := quality.measured_loss(k_quant, v_quant):
            logger.info("TurboQuant %s/%s, measured loss: %s", k_quant, v_quant, loss)

    def _calibrate(self) -> list[KeyConstants]:
        """Constants of the keys, from a short text that the model reads now."""
        started = time.perf_counter()
        constants = calibrate(
            lambda token_ids, offset: collect_key_samples(self.binding, token_ids, offset),
            cached_tokenizer_from_config(self.model_config).encode,
            self.model_config.max_model_len,
        )
        logger.info("TurboQuant keys calibrated in %.1f s", time.perf_counter() - started)
        return constants

    def _capacity(self, page_bytes: int) -> Capacity:
        return capacity(self.vllm_config, self._specs(), page_bytes)

    def _dense_capacity(self, page_bytes: int) -> Capacity | None:
        """What the same bytes would hold in 16-bit pages, where groups share blocks."""
        binding, model = self.binding, self.model_config
        if len(self.kv_cache.groups) == 1:
            return None
        dense = make_backends(
            binding.layers, self.cache_config.block_size, mx.float16, None, list, binding.states
        )
        specs = kv_cache_specs(dense, model.dtype, binding.states, model.max_model_len)
        return capacity(self.vllm_config, specs, page_bytes)

    def _measure_workspace(self) -> int:
        """Activations of the largest prefill, plus what attention over a full context adds."""
        longest = max(warm_up.WORKSPACE_PROBE_LENGTHS)
        smallest = min((backend.block_size for backend in self.backends), default=longest)
        num_blocks = -(-longest // smallest)
        kv_cache = KVCache(self.backends, num_blocks + 1, self.binding.states)
        self.binding.bind(kv_cache)
        peaks = warm_up.measure_prefill_peaks(self.binding, kv_cache)
        self.binding.bind(None)
        max_model_len = self.model_config.max_model_len
        query_len = min(self.scheduler_config.max_num_batched_tokens, max_model_len)
        num_heads = self.model_config.get_num_attention_heads(self.parallel_config)
        context = max(
            [
                backend.prefill_workspace_bytes(max_model_len - query_len, query_len, num_heads)
                for backend in self.backends
            ]
            or [0]
        )
        return planner.extrapolate_workspace(peaks, query_len) + context
