"""The engines that `vllm-metal bench` compares. Each runs in a process of its own.

An engine is loaded once and runs one case after the other. Every prompt is random and differs from
all others, so that no prefix is found in a cache. Nothing ends by itself: a case is left when it
has been measured.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vllm_metal.benchmark.timing import STEPS, Case

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

MLX_LM, DENSE = "mlx-lm", "dense"
"""Names of engines; a format pair is the name of another."""

MARGIN = 64
"""Tokens of a request beyond what a case counts: engines may be a few steps ahead."""


@dataclass(frozen=True)
class Settings:
    """What an engine is started with."""

    model: str
    revision: str | None
    trust_remote_code: bool
    longest: int
    """Tokens of the longest prompt."""
    most_requests: int
    chunk: int
    """Tokens of a prompt that are computed at a time."""
    memory_share: float | None
    """vLLM's `gpu_memory_utilization`; None: its default."""


class Engine(ABC):
    """One way to generate."""

    vocabulary: int

    @abstractmethod
    def cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds; None where nothing is planned ahead."""

    @abstractmethod
    def progress(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        """Generates greedily; gives the number of new tokens of each request, step by step."""

    def prompts(self, case: Case) -> list[list[int]]:
        """Random ones, the same for every engine."""
        rng = np.random.default_rng([case.requests, case.context])
        size = case.requests, case.context
        return rng.integers(10, self.vocabulary, size).tolist()


def load(name: str, settings: Settings) -> Engine:
    """The engine of this name. Raises what its loading raises."""
    return MlxLmEngine(settings) if name == MLX_LM else VllmEngine(name, settings)


class VllmEngine(Engine):
    """vLLM in this process, with the pages of this plugin."""

    def __init__(self, pages: str, settings: Settings):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options: dict[str, Any] = {}
        if pages != DENSE:
            k_quant, v_quant = pages.split("/")
            turboquant = {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant}
            options["additional_config"] = turboquant
        if settings.memory_share is not None:
            options["gpu_memory_utilization"] = settings.memory_share
        self._llm = LLM(
            settings.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            max_model_len=settings.longest + STEPS + MARGIN,
            max_num_seqs=settings.most_requests,
            max_num_batched_tokens=max(settings.chunk, settings.most_requests),
            disable_log_stats=True,
            **options,
        )
        self.vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self._cases = 0

    def cache_tokens(self) -> int:
        cache = self._llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None, "the engine has started"
        return cache.num_gpu_blocks * cache.block_size

    def progress(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        from vllm import SamplingParams

        engine, self._cases = self._llm.llm_engine, self._cases + 1
        given = {f"{self._cases}-{i}": 0 for i in range(len(prompts))}
        # A request that is first may decode while the others' prompts are computed.
        most = engine.vllm_config.model_config.max_model_len - len(prompts[0])
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        for request_id, prompt in zip(given, prompts, strict=True):
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        try:
            while engine.has_unfinished_requests():
                for output in cast("list[RequestOutput]", engine.step()):
                    given[output.request_id] = len(output.outputs[0].token_ids)
                yield list(given.values())
        finally:
            engine.abort_request(list(given))
            while engine.has_unfinished_requests():
                engine.step()


class MlxLmEngine(Engine):
    """mlx-lm's own generation: `generate_step` for one request, `BatchGenerator` for several."""

    def __init__(self, settings: Settings):
        from mlx_lm import load as load_model

        from vllm_metal.machine.device import select_device

        select_device()
        loaded = load_model(
            settings.model,
            tokenizer_config={"trust_remote_code": settings.trust_remote_code},
            revision=settings.revision,
            return_config=True,
        )
        self._model, config = loaded[0], cast("dict[str, Any]", loaded[-1])
        self._chunk = settings.chunk
        self._most = settings.most_requests
        self.vocabulary = (config.get("text_config") or config)["vocab_size"]

    def cache_tokens(self) -> None:
        return None

    def progress(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        return self._one(prompts[0]) if len(prompts) == 1 else self._several(prompts)

    def _one(self, prompt: list[int]) -> Iterator[list[int]]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        steps = generate_step(
            mx.array(prompt), self._model, max_tokens=STEPS + MARGIN, prefill_step_size=self._chunk
        )
        for given, _ in enumerate(steps, 1):
            yield [given]

    def _several(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        from mlx_lm.generate import BatchGenerator

        generator = BatchGenerator(
            self._model,
            completion_batch_size=self._most,
            prefill_batch_size=min(self._most, 8),
            prefill_step_size=self._chunk,
        )
        # Those that begin first go on while the prompts of the others are computed.
        begins = -(-len(prompts) * len(prompts[0]) // self._chunk)
        most = [STEPS + MARGIN + begins] * len(prompts)
        given = dict.fromkeys(generator.insert(prompts, most), 0)
        try:
            while responses := generator.next_generated():
                for response in responses:
                    given[response.uid] += 1
                yield list(given.values())
        finally:
            generator.close()
