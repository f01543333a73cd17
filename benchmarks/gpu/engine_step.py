"""Decode steps of the whole engine on a GPU, beside mlx-lm's own generation of the same model.

    python benchmarks/gpu/engine_step.py MODEL_FOLDER mlx-lm
    python benchmarks/gpu/engine_step.py MODEL_FOLDER dense [--cases 1x512,8x8192]
    python benchmarks/gpu/engine_step.py MODEL_FOLDER q8_0/q3_0 [--cases ...] [--output FILE]

A case is REQUESTSxTOKENS. The time of a decode step is that of 128 steps: greedy requests of 161
new tokens less the same requests of 33, the prompts cached, best of `ROUNDS`. mlx-lm generates one
request at a time, so it has the cases of one request only.

Then 20 requests of mixed lengths run together, after two that warm the engine up: no kernel should
be compiled any more. On CUDA, MLX keeps what it compiles as files, which are counted and named; for
that, each run has an empty folder for them, and compiles everything anew at first.

Every figure is a line of JSON on standard output, and in FILE if it is given. Needs vLLM, MLX on a
GPU and mlx-lm; reaches no network.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_METAL_STARTUP_CACHE", "off")
COMPILED = Path(tempfile.mkdtemp(prefix="compiled-"))
os.environ["MLX_PTX_CACHE_DIR"] = str(COMPILED)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

CASES = "1x512,1x8192,1x32000,8x8192,16x1024"
MAX_MODEL_LEN, MAX_NUM_SEQS, PREFILL_CHUNK = 36_000, 16, 2048
SHORT, LONG, ROUNDS = 33, 161, 3
"""New tokens of the two runs whose difference is timed, and how often they are."""
MIXED_LENGTHS = (3, 700, 40, 2500, 129, 1, 9000, 16, 333, 65, 5000, 12, 1024, 250, 31, 7, 90, 3000)
VOCABULARY = 49_000


def prompts(requests: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng([requests, length, seed])
    return rng.integers(10, VOCABULARY, (requests, length)).tolist()


class Report:
    """Prints a line for each figure, and appends it to a file."""

    def __init__(self, pages: str, output: Path | None):
        self._pages, self._output = pages, output

    def __call__(self, what: str, **figures) -> None:
        line = json.dumps({"what": what, "pages": self._pages} | figures)
        print(line, flush=True)
        if self._output:
            with self._output.open("a") as file:
                file.write(line + "\n")


def compiled() -> set[str]:
    """Names of the modules that MLX CUDA has compiled in this process."""
    return {path.stem for path in COMPILED.rglob("*.ptx")}


def mlx_lm_steps(model_folder: str, lengths: Sequence[int], report: Report) -> None:
    """`generate_step`, once to warm up and once for the figures."""
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, _ = mlx_lm.load(model_folder)
    for length in lengths:
        [prompt] = prompts(1, length)
        for _ in range(2):
            mx.reset_peak_memory()
            started, times = time.perf_counter(), []
            for _ in generate_step(
                mx.array(prompt), model, max_tokens=LONG, prefill_step_size=PREFILL_CHUNK
            ):
                times.append(time.perf_counter())
        report(
            "step",
            requests=1,
            tokens=length,
            milliseconds=1e3 * (times[-1] - times[SHORT - 1]) / (LONG - SHORT),
            first_token_seconds=times[0] - started,
            peak_gb=mx.get_peak_memory() / 1e9,
        )


class Engine:
    """vLLM's engine in this process."""

    def __init__(self, model_folder: str, pages: str, report: Report):
        from vllm import LLM

        settings = {}
        if pages != "dense":
            k_quant, v_quant = pages.split("/")
            turboquant = {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant}
            settings = {"additional_config": turboquant}
        started = time.perf_counter()
        self._llm = LLM(
            model_folder,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=PREFILL_CHUNK,
            gpu_memory_utilization=0.85,
            disable_log_stats=True,
            **settings,
        )
        self._report = report
        report("start", seconds=time.perf_counter() - started, held_gb=mx.get_active_memory() / 1e9)

    def run(self, token_ids: list[list[int]], new_tokens: int | Sequence[int]) -> float:
        """Seconds until all requests are finished."""
        from vllm import SamplingParams

        counts = [new_tokens] * len(token_ids) if isinstance(new_tokens, int) else new_tokens
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in counts]
        given = [{"prompt_token_ids": prompt} for prompt in token_ids]
        started = time.perf_counter()
        outputs = self._llm.generate(given, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        for output, count in zip(outputs, counts, strict=True):
            assert len(output.outputs[0].token_ids) == count, output.outputs[0].finish_reason
        return seconds

    def step(self, requests: int, length: int) -> None:
        """One case."""
        given = prompts(requests, length)
        mx.reset_peak_memory()
        first = self.run(given, 1)
        self.run(given, LONG)
        seconds = [(self.run(given, SHORT), self.run(given, LONG)) for _ in range(ROUNDS)]
        self._report(
            "step",
            requests=requests,
            tokens=length,
            milliseconds=1e3 * min(long - short for short, long in seconds) / (LONG - SHORT),
            all_seconds=seconds,
            first_token_seconds=first / requests,
            peak_gb=mx.get_peak_memory() / 1e9,
        )

    def mixed(self) -> None:
        """Requests of many lengths, after two: what was compiled for them."""
        self.run(prompts(1, 300, seed=1), 8)
        self.run(prompts(1, 20, seed=2), 8)
        before = compiled()
        lengths = [*MIXED_LENGTHS, 517, 77]
        given = [prompts(1, length, seed=3 + i)[0] for i, length in enumerate(lengths)]
        seconds = self.run(given, [5 + 7 * i % 60 for i in range(len(given))])
        new = sorted(compiled() - before)
        self._report(
            "mixed",
            requests=len(given),
            seconds=seconds,
            compiled_before=len(before),
            compiled=len(new),
            names=new,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("pages", help="mlx-lm, dense, or a pair of formats such as q8_0/q3_0")
    parser.add_argument("--cases", default=CASES, metavar="REQUESTSxTOKENS,...")
    parser.add_argument("--output", type=Path, help="append the figures to this file")
    arguments = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in filter(None, arguments.cases.split(","))]
    report = Report(arguments.pages, arguments.output)
    report("machine", device=str(mx.device_info().get("device_name")), mlx=mx.__version__)
    if arguments.pages == "mlx-lm":
        mlx_lm_steps(
            arguments.model, [length for requests, length in cases if requests == 1], report
        )
        return
    engine = Engine(arguments.model, arguments.pages, report)
    engine.mixed()
    for requests, length in cases:
        engine.step(requests, length)


if __name__ == "__main__":
    main()
