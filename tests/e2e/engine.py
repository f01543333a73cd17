"""An offline vLLM engine in this process, and mlx-lm's own generation to compare with."""

import contextlib
import gc
import os
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm_metal.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from tests import garbage  # noqa: E402

PROMPT_LENGTHS = (5, 64, 250, 500)
"""Tokens: within a block, whole blocks, and several chunks with a part of a block at the end."""
NEW_TOKENS = 16

CHUNKS_IN_FEW_BLOCKS = {
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 56,
    "enable_prefix_caching": False,
    "max_model_len": 528,
    "disable_log_stats": False,
}
"""Settings of an engine whose pages hold prompts of `PROMPT_LENGTHS`, and 55 blocks in all: the
last request is preempted when those before it grow by a block."""


@contextlib.contextmanager
def engine(model: Path, **settings) -> Iterator[LLM]:
    """A small float32 engine; its memory is released on leaving."""
    defaults = {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 400 << 20,
        "max_num_seqs": 16,
        "disable_log_stats": True,
    }
    garbage.leave_out_imports()
    llm = LLM(str(model), **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        mx.clear_cache()


def prompts(model: Path, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """One prompt of each length, from different places of Python's documentation."""
    _, tokenizer = mlx_lm.load(str(model), lazy=True)
    text = "".join(pydoc_data.topics.topics.values())
    token_ids = tokenizer.encode(text[:40000])
    return [token_ids[900 * i : 900 * i + length] for i, length in enumerate(lengths)]


def mlx_lm_tokens(model: Path, token_ids: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What mlx-lm generates greedily, one prompt at a time, with its own caches."""
    reference, _ = mlx_lm.load(str(model))
    reference.set_dtype(mx.float32)
    return [
        [
            int(token)
            for token, _ in generate_step(mx.array(prompt), reference, max_tokens=new_tokens)
        ]
        for prompt in token_ids
    ]


def greedy(new_tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **more)


def generate(
    llm: LLM,
    token_ids: list[list[int]],
    params: SamplingParams | list[SamplingParams] | None = None,
) -> list[list[int]]:
    """Tokens of each prompt, all submitted at once; greedy unless `params` says otherwise."""
    params = params or greedy(NEW_TOKENS)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in token_ids], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def generate_preempted(
    llm: LLM, token_ids: list[list[int]], params: SamplingParams, after: int
) -> list[list[int]]:
    """As `generate`; after some steps, before any is finished, all that run are preempted."""
    prompts = [{"prompt_token_ids": prompt} for prompt in token_ids]
    llm.enqueue(prompts, params, use_tqdm=False)
    for _ in range(after):
        llm.llm_engine.step()
    llm.reset_prefix_cache(reset_running_requests=True)
    outputs = llm.wait_for_completion(use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def num_preemptions(llm: LLM) -> int:
    """Requests preempted so far in an engine that logs statistics."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return metrics["vllm:num_preemptions"].value


def num_cached_tokens(llm: LLM, token_ids: list[int]) -> int:
    """Prompt tokens that a fresh request takes from the prefix cache."""
    output = llm.generate(
        [{"prompt_token_ids": token_ids}],
        SamplingParams(temperature=0, max_tokens=1),
        use_tqdm=False,
    )[0]
    return output.num_cached_tokens
