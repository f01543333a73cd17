"""Throughput of the engine against mlx-lm, side by side in one run.

    python benchmarks/serving.py [--model FOLDER] [--output FILE]

Three ratios on the same model, weights in float32, dense KV cache. Engine and mlx-lm take turns,
round by round, so that a busy machine slows both; the figure is the median over the rounds.

    decode, batch 1   engine tokens/s over mlx_lm.stream_generate tokens/s
    decode, batch 8   engine tokens/s over 8 / (time of one raw (8, 1) mlx-lm forward)
    prefill           engine tokens/s over mlx-lm tokens/s, time to the first token

The per-step overhead is the engine's time per decode step in Python on the thread that drives it,
without the time it waits for MLX.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # what `register` sets for the engine
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm_metal.machine.blas import load_fast_blas

BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm.models.cache import BatchKVCache  # noqa: E402
from stepped_engine import (  # noqa: E402
    NEW_TOKENS,
    PREFILL_LEN,
    PROMPT_LEN,
    Engine,
    decode_rate,
)

from vllm_metal.commands.demo_model import fetch_demo_model  # noqa: E402
from vllm_metal.machine.provenance import provenance  # noqa: E402
from vllm_metal.runner.model_runner import ModelRunner  # noqa: E402
from vllm_metal.runner.steps_in_flight import StepsInFlight  # noqa: E402


def mlx_lm_decode_rate(model, tokenizer, prompt: list[int]) -> float:
    times = [
        time.perf_counter()
        for _ in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=NEW_TOKENS)
    ]
    return (len(times) - 2) / (times[-1] - times[1])


def mlx_lm_prefill_rate(model, tokenizer, prompt: list[int]) -> float:
    start = time.perf_counter()
    for _ in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=1):
        break
    return len(prompt) / (time.perf_counter() - start)


def raw_forward_seconds(model, prompts: list[list[int]]) -> float:
    """Median time of a (8, 1) forward over the middle of the engine's context lengths."""
    caches = [BatchKVCache([0] * len(prompts)) for _ in model.layers]
    mx.eval(model(mx.array(prompts), cache=caches))
    tokens = mx.array([[prompt[-1]] for prompt in prompts])
    times = []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        logits = model(tokens, cache=caches)[:, -1]
        tokens = mx.argmax(logits, axis=-1)[:, None]
        mx.eval(tokens)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class StepOverhead:
    """Times what the runner does in Python for one decode step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._waited = 0.0

    def install(self) -> None:
        runner, finish = ModelRunner, StepsInFlight.finish
        execute, sample = runner.execute_model, runner.sample_tokens

        def timed_finish(this, but=0):
            start = time.perf_counter()
            finish(this, but)
            self._waited += time.perf_counter() - start

        def timed_execute(this, scheduled):
            self._waited = 0.0
            self._start = time.perf_counter()
            return execute(this, scheduled)

        def timed_sample(this, grammar):
            output = sample(this, grammar)
            self.seconds.append(time.perf_counter() - self._start - self._waited)
            return output

        StepsInFlight.finish = timed_finish
        runner.execute_model = timed_execute
        runner.sample_tokens = timed_sample


def measure(model_path: str, rounds: int) -> dict:
    overhead = StepOverhead()
    overhead.install()
    engine = Engine(model_path)
    model, tokenizer = mlx_lm.load(model_path)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    vocabulary = 1000
    prompts = [[(7 * i + 13 * j) % vocabulary + 20 for j in range(PROMPT_LEN)] for i in range(8)]
    long_prompt = [(17 * j) % vocabulary + 20 for j in range(PREFILL_LEN)]
    engine.run(prompts[:1], 4)
    results: dict[str, list[tuple[float, float]]] = {"batch 1": [], "batch 8": [], "prefill": []}
    steps: dict[str, list[float]] = {"batch 1": [], "batch 8": []}
    for round_number in range(rounds):
        print(f"round {round_number + 1} of {rounds}", file=sys.stderr)
        ours = decode_rate(engine.run(prompts[:1], NEW_TOKENS), 1)
        steps["batch 1"] += overhead.seconds[-NEW_TOKENS // 2 :]
        results["batch 1"].append((ours, mlx_lm_decode_rate(model, tokenizer, prompts[0])))
        ours = decode_rate(engine.run(prompts, NEW_TOKENS), 8)
        steps["batch 8"] += overhead.seconds[-NEW_TOKENS // 2 :]
        results["batch 8"].append((ours, 8 / raw_forward_seconds(model, prompts)))
        first_token = engine.run([long_prompt], 1)[0][0]
        results["prefill"].append(
            (PREFILL_LEN / first_token, mlx_lm_prefill_rate(model, tokenizer, long_prompt))
        )
    return {
        "ratios": {
            name: {
                "engine_tokens_per_s": round(statistics.median(o for o, _ in pairs), 2),
                "mlx_lm_tokens_per_s": round(statistics.median(r for _, r in pairs), 2),
                "ratio": round(statistics.median(o / r for o, r in pairs), 3),
                "ratios_by_round": [round(o / r, 3) for o, r in pairs],
            }
            for name, pairs in results.items()
        },
        "python_ms_per_decode_step": {
            name: round(1000 * statistics.median(seconds), 2) for name, seconds in steps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    figures = {
        **provenance("mlx", "mlx-lm", "vllm", "torch"),
        "blas": BLAS,
        "prompt_len": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "prefill_len": PREFILL_LEN,
        **measure(args.model or str(fetch_demo_model()), args.rounds),
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
