"""Times a prefill chunk over a compressed context against PyTorch's fp16 attention of that shape.

    python benchmarks/gpu/prefill.py [--output results.json]

Needs MLX and PyTorch with CUDA. One layer, fp16, 32 query and 8 KV heads of 128; medians of
wall-clock times, the launches of either library included.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vllm_metal.attention.backend import Chunk, LayerShape
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.attention.slots import compose_slots
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format
from vllm_metal.metal_kernel_backend.turboquant.fused import TurboQuantFused

HEADS, BLOCK_SIZE, REPEATS = 32, 16, 7
SHAPE = LayerShape(num_kv_heads=8, head_size=128, head_size_v=128)
CHUNKS, CONTEXT = (512, 2048), 32_768


def median_ms(run, synchronize) -> float:
    run()
    synchronize()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def ours_ms(pair: tuple[str, str], chunk: int) -> tuple[float, float]:
    """Time; memory beside pages and inputs, in MiB."""
    constants = KeyConstants.neutral(SHAPE.num_kv_heads, SHAPE.head_size)
    formats = key_format(pair[0]), value_format(pair[1])
    backend = TurboQuantFused(SHAPE, BLOCK_SIZE, formats, constants, CudaTarget())
    blocks = -(-(CONTEXT + chunk) // BLOCK_SIZE)
    pages = KVCache([backend], blocks + 1).pages(0)
    table = 1 + mx.random.permutation(blocks).astype(mx.int32)[None]
    mx.eval(table, pages)
    for start in range(0, CONTEXT, 4096):
        metadata = chunk_metadata(table, start, 4096)
        keys, values = (random(4096, SHAPE.num_kv_heads) for _ in range(2))
        pages = backend.store(pages, keys, values, metadata)
        mx.eval(pages)
    metadata = chunk_metadata(table, CONTEXT, chunk)
    queries, keys, values = (
        random(heads, chunk) for heads in (HEADS, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    )
    mx.eval(queries, keys, values)
    handed = Chunk(queries, keys, values, metadata, SHAPE.head_size**-0.5)
    held = mx.get_active_memory()
    mx.reset_peak_memory()

    def run():
        mx.eval(backend.prefill(pages, handed))

    milliseconds, workspace = median_ms(run, mx.synchronize), mx.get_peak_memory() - held
    return milliseconds, workspace / 2**20


def chunk_metadata(table: mx.array, start: int, count: int) -> PrefillMetadata:
    [slots] = compose_slots(np.array(table), np.arange(start, start + count)[None], BLOCK_SIZE)
    return PrefillMetadata(
        block_table=table,
        slot_mapping=mx.array(slots),
        context_len=start,
        query_len=count,
    )


def random(*shape: int) -> mx.array:
    return mx.random.normal((*shape, SHAPE.head_size)).astype(mx.float16)


def dense_ms(chunk: int) -> float:
    def normal(heads, tokens):
        shape = 1, heads, tokens, SHAPE.head_size
        return torch.randn(shape, device="cuda", dtype=torch.float16)

    queries = normal(HEADS, chunk)
    keys, values = (normal(SHAPE.num_kv_heads, CONTEXT + chunk) for _ in range(2))
    mask = causal_lower_right(chunk, CONTEXT + chunk)

    def run():
        scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    return median_ms(run, torch.cuda.synchronize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the numbers as JSON")
    arguments = parser.parse_args()
    rows = []
    for chunk in CHUNKS:
        dense = dense_ms(chunk)
        torch.cuda.empty_cache()
        for pair in (("q8_0", "q3_0"), ("q4_0", "q4_0")):
            ours, workspace = ours_ms(pair, chunk)
            row = {"chunk": chunk, "context": CONTEXT, "k_quant": pair[0], "v_quant": pair[1]}
            rows.append(row | {"ms": ours, "dense_ms": dense, "workspace_mib": workspace})
            print(
                f"{chunk} over {CONTEXT}: {'/'.join(pair)} {ours:.2f} ms,"
                f" {workspace:.0f} MiB beside;"
                f" fp16 attention {dense:.2f} ms",
                flush=True,
            )
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(rows, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
