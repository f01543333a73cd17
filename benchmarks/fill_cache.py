"""Fills the KV cache to its last block under load and compares peak memory with the plan.

    python benchmarks/fill_cache.py [--output FILE]

The demo model in float32, in an engine in this process, dense and with TurboQuant: more requests
than the cache holds, each long enough to run until the last has come, so that every block is in use
and requests are preempted. Peak memory is MLX's own; the plan is weights, workspace and pages.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # what `register` sets for the engine
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm_metal.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from vllm_metal.commands.demo_model import fetch_demo_model  # noqa: E402
from vllm_metal.machine.provenance import provenance  # noqa: E402

KINDS = {
    "dense float32": {},
    "turboquant q8_0/q3_0": {
        "additional_config": {"turboquant": True, "k_quant": "q8_0", "v_quant": "q3_0"}
    },
}


def run(settings: dict, cache_bytes: int, prompt_len: int, output_len: int) -> dict:
    llm = LLM(
        str(fetch_demo_model()),
        dtype="float32",
        max_model_len=prompt_len + output_len,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=cache_bytes,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **settings,
    )
    core = llm.llm_engine.engine_core
    worker = llm.llm_engine.model_executor.driver_worker.worker
    pool = core.engine_core.scheduler.kv_cache_manager.block_pool
    fewest = pool.get_num_free_blocks()
    get_new_blocks = pool.get_new_blocks

    def counted(num_blocks: int):
        nonlocal fewest
        blocks = get_new_blocks(num_blocks)
        fewest = min(fewest, pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = counted
    requests = 2 + pool.get_num_free_blocks() * 16 // prompt_len
    prompts = [
        {"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 20 for j in range(prompt_len)]}
        for i in range(requests)
    ]
    mx.reset_peak_memory()
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    preemptions = {m.name: m for m in llm.get_metrics()}["vllm:num_preemptions"].value
    plan = worker.plan
    planned = plan.weights + plan.workspace + worker.kv_cache.nbytes
    figures = {
        "blocks": worker.kv_cache.num_blocks,
        "fewest_free_blocks": fewest,
        "requests": requests,
        "preemptions": preemptions,
        "seconds": round(time.perf_counter() - started),
        "weights_bytes": plan.weights,
        "workspace_bytes": plan.workspace,
        "page_bytes": worker.kv_cache.nbytes,
        "planned_bytes": planned,
        "peak_bytes": mx.get_peak_memory(),
        "peak_over_plan": round(mx.get_peak_memory() / planned, 4),
    }
    core.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache-bytes", type=int, default=320 << 20)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=120)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    figures = provenance("mlx", "mlx-lm", "vllm")
    for kind in args.kinds:
        figures[kind] = run(KINDS[kind], args.cache_bytes, args.prompt_len, args.output_len)
        gc.collect()
        mx.clear_cache()
        print(kind, json.dumps(figures[kind], indent=2), flush=True)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
