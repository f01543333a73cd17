"""Times store and decode on an NVIDIA GPU against PyTorch's fp16 attention and a copy.

    python benchmarks/gpu/attention.py [--output results.json]

Needs MLX, CuPy and PyTorch with CUDA; reaches no network. Device times are medians of CUDA graphs
of ten launches, each on pages of its own so that no cache holds them; block tables are shuffled.
`through MLX` is the wall-clock time of a decode when 20 are evaluated together; `host` is the time
that Python and MLX take to queue one, which a server overlaps with the GPU's work.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time

import cupy as cp
import mlx.core as mx
import numpy as np
import torch
from cupy_target import CupyTarget
from torch.nn.functional import scaled_dot_product_attention

from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget
from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

HEAD_SIZE, KV_HEADS, HEADS, BLOCK_SIZE = 128, 8, 32, 16
SHAPES = ((1, 32_768), (1, 131_072), (8, 32_768), (32, 8_192))
PAIRS = (("q8_0", "q3_0"), ("q4_0", "q3_0"), ("q6_0", "q4_0"), ("q5_0", "q4_0"))
REPEATS, LAUNCHES = 9, 10


def graph_us(launch) -> float:
    """Median device time of one launch, in microseconds; `launch(i)` is given its number."""
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        for i in range(LAUNCHES):
            launch(i)
        stream.synchronize()
        stream.begin_capture()
        for i in range(LAUNCHES):
            launch(i)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        times = []
        for _ in range(REPEATS):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def torch_us(launch) -> float:
    """The same for PyTorch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(LAUNCHES):
            launch(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(LAUNCHES):
                launch(i)
        graph.replay()
        stream.synchronize()
        times = []
        for _ in range(REPEATS):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def machine() -> dict:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "torch": torch.__version__,
        "cuda": cp.cuda.runtime.runtimeGetVersion(),
    }


def copy_terabytes_per_second() -> float:
    """A device-to-device copy of 4 GiB, bytes read and written."""
    size = 4 << 30
    source, target = cp.empty(size, cp.uint8), cp.empty(size, cp.uint8)
    source.fill(1)
    stream = cp.cuda.get_current_stream()
    times = []
    for _ in range(5):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record(stream)
        cp.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, size, 3, stream.ptr)
        end.record(stream)
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end) * 1e-3)
    return 2 * size / statistics.median(times) / 1e12


def dense_us(batch: int, length: int, sets: int) -> dict[str, float]:
    """PyTorch's attention on contiguous fp16 K/V: query heads grouped, and as rows of a KV head."""
    shape = batch, KV_HEADS, length, HEAD_SIZE
    keys = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(sets)]
    values = [torch.randn_like(key) for key in keys]
    query = torch.randn(batch, HEADS, 1, HEAD_SIZE, device="cuda", dtype=torch.float16)
    rows = query.reshape(batch, KV_HEADS, -1, HEAD_SIZE)

    def grouped(i):
        scaled_dot_product_attention(query, keys[i % sets], values[i % sets], enable_gqa=True)

    def as_rows(i):
        scaled_dot_product_attention(rows, keys[i % sets], values[i % sets])

    return {"grouped": torch_us(grouped), "rows": torch_us(as_rows)}


class Decode:
    """Pages of random codes, and queries over all of them."""

    def __init__(self, pair: tuple[str, str], batch: int, length: int, sets: int):
        layout = PageLayout.of(*pair, HEAD_SIZE, KV_HEADS, BLOCK_SIZE)
        self.layout, self.batch, self.length, self.sets = layout, batch, length, sets
        self.cupy = Launcher(layout, CupyTarget())
        blocks = length // BLOCK_SIZE
        num_blocks = batch * blocks * sets + 1
        shape = num_blocks, KV_HEADS, layout.head_page_bytes
        pages = cp.random.randint(0, 256, shape, dtype=cp.uint8)
        for offset in (layout.key_scales_offset, layout.value_scales_offset):
            scales = cp.full((num_blocks, KV_HEADS, BLOCK_SIZE), 0.03, cp.float16)
            pages[:, :, offset : offset + 2 * BLOCK_SIZE] = scales.view(cp.uint8)
        self.pages = pages.view(cp.uint16)
        order = cp.random.permutation(num_blocks - 1).astype(cp.int32) + cp.int32(1)
        self.tables = list(order.reshape(sets, batch, blocks))
        # MLX would lengthen shorter arrays, which it cannot do with those of CuPy
        self.lengths = cp.full((max(batch, CONSTANT_BELOW),), length, cp.int32)
        shape = batch, 1, HEADS, HEAD_SIZE
        self.queries = cp.random.standard_normal(shape).astype(cp.float16)
        ones = cp.ones((KV_HEADS, HEAD_SIZE), cp.float32)
        self.constants = LayerConstants(0 * ones, ones, ones, cp.ones(HEAD_SIZE, cp.float32))
        self.token = cp.zeros(8, cp.uint32)

    def launch(self, i: int) -> cp.ndarray:
        return self.cupy.decode(
            self.pages,
            self.queries,
            self.tables[i % self.sets],
            self.lengths,
            self.constants,
            HEAD_SIZE**-0.5,
            self.length,
            self.token,
        )

    def through_mlx(self) -> tuple[float, float, float]:
        """Wall-clock us of one decode, us to queue it, and |MLX - CuPy| / |CuPy| of its output."""

        def move(array):
            return mx.array(cp.asnumpy(array))

        launcher = Launcher(self.layout, CudaTarget())
        pages, queries, lengths = move(self.pages), move(self.queries), move(self.lengths)
        tables = [move(table) for table in self.tables]
        ours = self.constants
        constants = LayerConstants(
            move(ours.centre),
            move(ours.key_factors),
            move(ours.query_factors),
            move(ours.value_factors),
        )
        token = launcher.no_token()
        mx.eval(pages, queries, lengths, tables, token)

        def launch(i):
            table = tables[i % self.sets]
            arguments = constants, HEAD_SIZE**-0.5, self.length, token
            return launcher.decode(pages, queries, table, lengths, *arguments)

        output, expected = np.array(launch(0)), cp.asnumpy(self.launch(0)).astype(np.float32)
        error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
        times, host = [], []
        for _ in range(REPEATS):
            mx.synchronize()
            queued = time.perf_counter()
            outputs = [launch(i) for i in range(20)]
            start = time.perf_counter()
            mx.eval(outputs)
            mx.synchronize()
            times.append((time.perf_counter() - start) / 20 * 1e6)
            host.append((start - queued) / 20 * 1e6)
        return statistics.median(times), statistics.median(host), float(error)


def store_us(tokens: int) -> tuple[float, float]:
    """One new token of each of `tokens` requests: ours, and a dense scatter of K and V."""
    layout = PageLayout.of("q8_0", "q3_0", HEAD_SIZE, KV_HEADS, BLOCK_SIZE)
    launcher = Launcher(layout, CupyTarget())
    pages = cp.zeros(layout.pages_shape(4096), cp.uint16)
    new = cp.random.standard_normal((tokens, KV_HEADS, HEAD_SIZE)).astype(cp.float16)
    slots = cp.full((max(tokens, CONSTANT_BELOW),), -1, cp.int32)
    slots[:tokens] = cp.arange(tokens, dtype=cp.int32) * 37
    ones = cp.ones((KV_HEADS, HEAD_SIZE), cp.float32)
    constants = LayerConstants(0 * ones, ones, ones, cp.ones(HEAD_SIZE, cp.float32))
    token = cp.zeros(8, cp.uint32)
    ours = graph_us(lambda _: launcher.store(pages, new, new, slots, constants, token))
    shape = 4096 * BLOCK_SIZE, KV_HEADS, HEAD_SIZE
    keys = torch.zeros(shape, device="cuda", dtype=torch.float16)
    values = torch.zeros_like(keys)
    index = torch.arange(tokens, device="cuda") * 37
    dense_new = torch.randn(tokens, *shape[1:], device="cuda", dtype=torch.float16)

    def dense(_):
        keys.index_copy_(0, index, dense_new)
        values.index_copy_(0, index, dense_new)

    return ours, torch_us(dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the results as JSON")
    arguments = parser.parse_args()
    results = {"machine": machine(), "copy_terabytes_per_second": copy_terabytes_per_second()}
    print(json.dumps(results), flush=True)
    results["decode"], results["store"] = [], []
    for batch, length in SHAPES:
        sets = 4 if batch == 1 else 2
        dense = dense_us(batch, length, sets)
        torch.cuda.empty_cache()
        best = min(dense.values())
        print(f"{batch} x {length}: fp16 attention {best:.1f} us", flush=True)
        for pair in PAIRS:
            case = Decode(pair, batch, length, sets)
            device = graph_us(case.launch)
            wall, host, error = case.through_mlx() if pair in PAIRS[:2] else (None,) * 3
            size = batch * length * KV_HEADS * case.layout.slot_size
            row = {
                "batch": batch,
                "context": length,
                "k_quant": pair[0],
                "v_quant": pair[1],
                "dense_us": dense,
                "us": device,
                "ratio": device / best,
                "through_mlx_us": wall,
                "host_us": host,
                "mlx_against_cupy": error,
                "gigabytes_per_second": size / device / 1e3,
            }
            results["decode"].append(row)
            print(
                f"  {'/'.join(pair)}: {device:6.1f} us, {row['ratio']:.2f} x, "
                f"{row['gigabytes_per_second']:.0f} GB/s of compressed bytes"
                + (
                    f", through MLX {wall:.1f} us (host {host:.1f} us, differs {error:.0e})"
                    if wall
                    else ""
                ),
                flush=True,
            )
            del case
            cp.get_default_memory_pool().free_all_blocks()
    for tokens in (1, 8, 32):
        ours, dense = store_us(tokens)
        results["store"].append({"tokens": tokens, "us": ours, "dense_us": dense})
        print(f"store of {tokens} tokens: {ours:.1f} us, dense {dense:.1f} us", flush=True)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(results, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
