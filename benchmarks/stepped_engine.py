"""vLLM's engine in this process, stepped by hand so that each step can be timed.

Nothing is asked of this repository, so that another checkout of it can be measured as well.
"""

import time

from vllm import LLM, SamplingParams

PROMPT_LEN = 128
NEW_TOKENS = 48
PREFILL_LEN = 512


class Engine:
    """Dense KV cache, weights in float32."""

    def __init__(self, model: str):
        self.llm = LLM(
            model,
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=8,
            kv_cache_memory_bytes=400 << 20,
            enable_prefix_caching=False,
        )
        self._count = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> list[tuple[float, int]]:
        """Runs the prompts together; (time, tokens so far) after each step that gave tokens."""
        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        seen: dict[str, int] = {}
        marks = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = len(output.outputs[0].token_ids)
            if seen:
                marks.append((time.perf_counter() - start, sum(seen.values())))
        return marks


def decode_rate(marks: list[tuple[float, int]], prompts: int) -> float:
    """Tokens per second once every prompt has its first token."""
    started = [mark for mark in marks if mark[1] >= prompts]
    (first, low), (last, high) = started[1], started[-1]
    return (high - low) / (last - first)
