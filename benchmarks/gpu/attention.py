"""Times store and decode, dense and compressed, on an NVIDIA GPU against PyTorch's fp16 attention.

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
from dataclasses import replace

import cupy as cp
import mlx.core as mx
import numpy as np
import torch
from cuda_program import Kind, kind_name, launcher_of, layout_of
from cupy_target import CupyTarget
from graph_times import REPEATS, graph_us, torch_us
from torch.nn.functional import scaled_dot_product_attention

from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget
from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants as DenseConstants
from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW
from vllm_metal.metal_kernel_backend.turboquant.launcher import LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

HEAD_SIZE, KV_HEADS, HEADS, BLOCK_SIZE = 128, 8, 32, 16
SHAPES = ((1, 1_024), (1, 32_768), (1, 131_072), (8, 32_768), (32, 8_192))
KINDS = (mx.float16, ("q8_0", "q3_0"), ("q4_0", "q3_0"), ("q6_0", "q4_0"), ("q5_0", "q4_0"))
"""Types of dense pages, and formats of keys and values."""
THROUGH_MLX = KINDS[:3]


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


def dense_us(batch: int, length: int, sets: int, heads: int = HEADS) -> dict[str, float]:
    """PyTorch's attention on contiguous fp16 K/V: query heads grouped, and as rows of a KV head."""
    shape = batch, KV_HEADS, length, HEAD_SIZE
    keys = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(sets)]
    values = [torch.randn_like(key) for key in keys]
    query = torch.randn(batch, heads, 1, HEAD_SIZE, device="cuda", dtype=torch.float16)
    rows = query.reshape(batch, KV_HEADS, -1, HEAD_SIZE)

    def grouped(i):
        scaled_dot_product_attention(query, keys[i % sets], values[i % sets], enable_gqa=True)

    def as_rows(i):
        scaled_dot_product_attention(rows, keys[i % sets], values[i % sets])

    return {"grouped": torch_us(grouped), "rows": torch_us(as_rows)}


def filled(layout: PageLayout | DenseLayout, num_blocks: int) -> cp.ndarray:
    """Pages of random codes, scales of 0.03 and biases of -0.2, or of normally distributed
    numbers."""
    if isinstance(layout, DenseLayout):
        shape = layout.pages_shape(num_blocks)
        return cp.random.standard_normal(shape, dtype=cp.float32).astype(cp.float16)
    shape = num_blocks, KV_HEADS, layout.head_page_bytes
    pages = cp.random.randint(0, 256, shape, dtype=cp.uint8)
    numbers = [(layout.key_scales_offset, 0.03), (layout.value_scales_offset, 0.03)]
    if layout.key_format.has_bias:
        numbers.append((layout.key_biases_offset, -0.2))
    for offset, number in numbers:
        halves = cp.full((num_blocks, KV_HEADS, BLOCK_SIZE), number, cp.float16)
        pages[:, :, offset : offset + 2 * BLOCK_SIZE] = halves.view(cp.uint8)
    return pages.view(cp.uint16)


def neutral_constants(kind: Kind) -> LayerConstants | DenseConstants:
    """Constants that change nothing; dense pages have none."""
    if isinstance(kind, mx.Dtype):
        return DenseConstants()
    ones = cp.ones((KV_HEADS, HEAD_SIZE), cp.float32)
    return LayerConstants(0 * ones, ones, ones, cp.ones(HEAD_SIZE, cp.float32))


class Decode:
    """Filled pages, and queries over all of them. `options` are the launcher's."""

    def __init__(
        self, kind: Kind, batch: int, length: int, sets: int, heads: int = HEADS, **options
    ):
        self.layout = layout = layout_of(kind, HEAD_SIZE, KV_HEADS, BLOCK_SIZE)
        self.batch, self.length, self.sets = batch, length, sets
        self.cupy = launcher_of(layout, CupyTarget(), **options)
        blocks = length // BLOCK_SIZE
        num_blocks = batch * blocks * sets + 1
        self.pages = filled(layout, num_blocks)
        order = cp.random.permutation(num_blocks - 1).astype(cp.int32) + cp.int32(1)
        self.tables = list(order.reshape(sets, batch, blocks))
        # MLX would lengthen shorter arrays, which it cannot do with those of CuPy
        self.lengths = cp.full((max(batch, CONSTANT_BELOW),), length, cp.int32)
        shape = batch, 1, heads, HEAD_SIZE
        self.queries = cp.random.standard_normal(shape).astype(cp.float16)
        self.constants = neutral_constants(kind)
        self.token = cp.zeros(8, cp.uint32)

    @property
    def bytes_read(self) -> int:
        """Of keys and values, with what belongs to them."""
        return self.batch * self.length * self.layout.page_size_bytes // BLOCK_SIZE

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

        launcher = launcher_of(self.layout, CudaTarget())
        pages, queries, lengths = move(self.pages), move(self.queries), move(self.lengths)
        tables = [move(table) for table in self.tables]
        constants = replace(
            self.constants, **{name: move(x) for name, x in self.constants.inputs().items()}
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


def store_us(kind: Kind, tokens: int) -> float:
    """One new token of each of `tokens` requests."""
    layout = layout_of(kind, HEAD_SIZE, KV_HEADS, BLOCK_SIZE)
    launcher = launcher_of(layout, CupyTarget())
    pages = cp.zeros(layout.pages_shape(4096), filled(layout, 1).dtype)
    new = cp.random.standard_normal((tokens, KV_HEADS, HEAD_SIZE)).astype(cp.float16)
    slots = cp.full((max(tokens, CONSTANT_BELOW),), -1, cp.int32)
    slots[:tokens] = cp.arange(tokens, dtype=cp.int32) * 37
    constants, token = neutral_constants(kind), cp.zeros(8, cp.uint32)
    return graph_us(lambda _: launcher.store(pages, new, new, slots, constants, token))


def scatter_us(tokens: int) -> float:
    """PyTorch's scatter of as many keys and values into contiguous fp16 arrays."""
    shape = 4096 * BLOCK_SIZE, KV_HEADS, HEAD_SIZE
    keys = torch.zeros(shape, device="cuda", dtype=torch.float16)
    values = torch.zeros_like(keys)
    index = torch.arange(tokens, device="cuda") * 37
    dense_new = torch.randn(tokens, *shape[1:], device="cuda", dtype=torch.float16)

    def dense(_):
        keys.index_copy_(0, index, dense_new)
        values.index_copy_(0, index, dense_new)

    return torch_us(dense)


def write(results: dict, output: str | None) -> None:
    """As JSON, where an output is asked for."""
    if output:
        with open(output, "w") as file:
            json.dump(results, file, indent=1)
            file.write("\n")


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
        for kind in KINDS:
            case = Decode(kind, batch, length, sets)
            device = graph_us(case.launch)
            wall, host, error = case.through_mlx() if kind in THROUGH_MLX else (None,) * 3
            row = {
                "batch": batch,
                "context": length,
                "pages": kind_name(kind),
                "dense_us": dense,
                "us": device,
                "ratio": device / best,
                "through_mlx_us": wall,
                "host_us": host,
                "mlx_against_cupy": error,
                "gigabytes_per_second": case.bytes_read / device / 1e3,
            }
            results["decode"].append(row)
            print(
                f"  {kind_name(kind)}: {device:6.1f} us, {row['ratio']:.2f} x, "
                f"{row['gigabytes_per_second']:.0f} GB/s of pages"
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
        ours, scatter = (
            {kind_name(kind): store_us(kind, tokens) for kind in KINDS[:2]},
            scatter_us(tokens),
        )
        results["store"].append({"tokens": tokens, "us": ours, "scatter_us": scatter})
        each = ", ".join(f"{name} {us:.1f} us" for name, us in ours.items())
        print(f"store of {tokens} tokens: {each}; scatter {scatter:.1f} us", flush=True)
    write(results, arguments.output)


if __name__ == "__main__":
    main()
