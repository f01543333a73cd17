"""vLLM's engine in this process and mlx-lm beside it, for the benchmarks of steps and first tokens.

Import this module before MLX and vLLM: it sets their environment. On CUDA, MLX keeps the kernels
that it compiles for its own operations as files in `$MLX_PTX_CACHE_DIR`, by default a temporary
folder that a second run finds again. Those of this project are kept, and counted, only where
`kept_kernels.cpp` keeps them in `$KEPT_KERNELS`.

A benchmark needs no calibrated keys and no probes of the model, whose results do not change its
speed: the keys get neutral constants, and the model counts as one that is decoded together and
traced. `as_served` leaves both as a server has them. What a start is doing is told on standard
error, with the seconds since the process began; after a minute without an end, with its stack.
"""

import contextlib
import faulthandler
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
COMPILED = Path(
    os.environ.setdefault("MLX_PTX_CACHE_DIR", f"{tempfile.gettempdir()}/compiled-by-mlx")
)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

MAX_NUM_SEQS, PREFILL_CHUNK = 16, 2048
STARTED = time.perf_counter()

Pages = str
"""`mlx-lm`, `dense`, or a pair of formats such as `q8_0/q3_0`."""


def say(text: str) -> None:
    """Tells where the process is, on standard error."""
    print(f"[{time.perf_counter() - STARTED:7.1f} s] {text}", file=sys.stderr, flush=True)


class Report:
    """Prints a line of JSON for each figure as soon as it is there, and appends it to a file."""

    def __init__(self, output: Path | None):
        self._output = output

    def __call__(self, what: str, pages: Pages, **figures: Any) -> None:
        line = json.dumps({"what": what, "pages": pages} | figures)
        print(line, flush=True)
        if self._output:
            with self._output.open("a") as file:
                file.write(line + "\n")


def compiled() -> set[str]:
    """Names of what was compiled on CUDA, in this process or before it; none on other backends."""
    kept = os.environ.get("KEPT_KERNELS")
    ours = {path.name for path in Path(kept).iterdir()} if kept else set()
    return ours | {path.stem for path in COMPILED.rglob("*.ptx")}


def prompts(requests: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    rng = np.random.default_rng([requests, length, seed])
    return rng.integers(10, vocabulary, (requests, length)).tolist()


class MlxLm:
    """mlx-lm's own generation, one request at a time."""

    def __init__(self, model_folder: str):
        import mlx_lm

        say("mlx-lm: loads the model")
        self._model, _ = mlx_lm.load(model_folder)
        mx.eval(self._model.parameters())

    def times(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Seconds from the request to each of its tokens."""
        from mlx_lm.generate import generate_step

        steps = generate_step(
            mx.array(prompt), self._model, max_tokens=new_tokens, prefill_step_size=PREFILL_CHUNK
        )
        started, times = time.perf_counter(), []
        for _ in steps:
            times.append(time.perf_counter() - started)
        return times


class Engine:
    """vLLM's engine.

    Args:
        model_folder: as `random_model.py` writes it.
        pages: not `mlx-lm`.
        max_model_len: tokens of the longest request.
        cache_gib: of pages.
        as_served: calibrate and probe as a server does.
    """

    def __init__(
        self,
        model_folder: str,
        pages: Pages,
        max_model_len: int,
        cache_gib: float,
        as_served: bool = False,
    ):
        say(f"{pages}: imports vLLM")
        from vllm import LLM

        settings: dict[str, Any] = {}
        if pages != "dense":
            k_quant, v_quant = pages.split("/")
            formats = {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant}
            settings = {"additional_config": formats}
        started, before = time.perf_counter(), compiled()
        faulthandler.dump_traceback_later(60, repeat=True)
        with _told_start(as_served):
            self._llm = LLM(
                model_folder,
                dtype="bfloat16",
                max_model_len=max_model_len,
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=PREFILL_CHUNK,
                kv_cache_memory_bytes=int(cache_gib * (1 << 30)),
                disable_log_stats=True,
                **settings,
            )
        faulthandler.cancel_dump_traceback_later()
        self.start = {
            "seconds": time.perf_counter() - started,
            "compiled": len(compiled() - before),
            "held_gb": mx.get_active_memory() / 1e9,
        }
        self.host = HostTimes()
        say(f"{pages}: started")

    def step_times(
        self, token_ids: list[list[int]], new_tokens: int | Sequence[int]
    ) -> list[float]:
        """Seconds from the beginning to the end of each step of the engine."""
        from vllm import SamplingParams

        counts = [new_tokens] * len(token_ids) if isinstance(new_tokens, int) else new_tokens
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in counts
        ]
        given = [{"prompt_token_ids": prompt} for prompt in token_ids]
        engine, started, times = self._llm.llm_engine, time.perf_counter(), []
        self._llm.enqueue(given, params, use_tqdm=False)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
            times.append(time.perf_counter() - started)
        found = sorted(len(output.outputs[0].token_ids) for output in outputs)
        assert found == sorted(counts), f"{found} new tokens, not {sorted(counts)}"
        return times

    def stop(self) -> None:
        """Gives the memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self.host.remove()
        gc.collect()
        mx.clear_cache()


class HostTimes:
    """What the thread that schedules does in a step, in milliseconds: medians by part.

    `build`: the forward pass as a graph; `dispatch`: MLX encodes it for the GPU; `wait`: for
    results of the GPU, which is not counted in the other two.
    """

    def __init__(self) -> None:
        from vllm_metal.runner.model_runner import ModelRunner
        from vllm_metal.runner.pending_tokens import PendingTokens

        self._waited = 0.0
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._restore: list[Callable[[], None]] = []
        self._time(ModelRunner, "execute_model", "build")
        self._time(ModelRunner, "sample_tokens", "dispatch")
        self._time(PendingTokens, "wait", "wait")

    def _time(self, owner: type, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments, **named):
            started, waited = time.perf_counter(), self._waited
            result = function(*arguments, **named)
            seconds = time.perf_counter() - started - (self._waited - waited)
            if part == "wait":
                self._waited += seconds
            self._seconds[part].append(seconds)
            return result

        setattr(owner, name, timed)
        self._restore.append(lambda: setattr(owner, name, function))

    def clear(self) -> None:
        self._seconds.clear()

    def medians(self) -> dict[str, float]:
        return {part: 1e3 * statistics.median(times) for part, times in self._seconds.items()}

    def remove(self) -> None:
        for restore in self._restore:
            restore()


@contextlib.contextmanager
def _told_start(as_served: bool) -> Iterator[None]:
    """Tells each part of the worker's start, and leaves out what a benchmark does not need."""
    from vllm_metal import worker
    from vllm_metal.metal_kernel_backend.selection import neutral_constants
    from vllm_metal.startup.decode_probe import Answer, DecodeAnswers

    kept: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, function: Callable) -> None:
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def told(name: str) -> Callable:
        function = getattr(worker.MetalWorker, name)

        def run(*arguments, **named):
            say(f"  {name}")
            return function(*arguments, **named)

        return run

    yes = Answer(True)
    if not as_served:
        replace(
            worker.MetalWorker,
            "_calibrate",
            lambda this: neutral_constants(this.binding.layers)(),
        )
        replace(worker.MetalWorker, "_check_loss", lambda *_: None)
        replace(worker.decode_probe, "ask", lambda *_: DecodeAnswers(yes, yes))
    for name in (
        *("init_device", "load_model", "_calibrate", "determine_available_memory"),
        *("initialize_from_config", "compile_or_warm_up_model"),
    ):
        replace(worker.MetalWorker, name, told(name))
    try:
        yield
    finally:
        for owner, name, function in reversed(kept):
            setattr(owner, name, function)
