"""Peak memory over 500 asynchronous decode steps of an mlx-lm Llama on each kind of page.

    python benchmarks/gpu/peak_memory.py

Needs MLX on a GPU and mlx-lm; no vLLM. The model is mlx-lm's own class with random weights, bound
as it is served, and steps follow one another as the server's do: each is built on the tokens of the
one before while that one runs, and dispatched behind it, or when it is done where MLX writes the
pages. A copy of one layer's pages would show in the peak; dense pages also show what a step gathers
from them.
"""

import argparse
import gc
import time

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs

from vllm_metal.attention.metadata import DecodeMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.runner.dispatch import make_dispatch

BATCH, BLOCK_SIZE, NUM_BLOCKS, BLOCKS_EACH, SETTLED = 8, 16, 4096, 64, 20
LLAMA = ModelArgs(
    model_type="llama",
    hidden_size=1024,
    num_hidden_layers=16,
    intermediate_size=2816,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    vocab_size=32_000,
)


def random_model() -> Model:
    mx.random.seed(0)
    model = Model(LLAMA)
    model.update(tree_map(lambda p: (p + mx.random.normal(p.shape) * 0.02).astype(mx.float16),
                          model.parameters()))  # fmt: skip
    mx.eval(model.parameters())
    return model


def run(turboquant: TurboQuantConfig | None, traced: bool, steps: int) -> None:
    binding = ModelBinding(random_model())
    constants = neutral_constants(binding.layers)
    backends = make_backends(binding.layers, BLOCK_SIZE, mx.float16, turboquant, constants)
    kv_cache = KVCache(backends, NUM_BLOCKS)
    model = binding.bind(kv_cache)
    forward = DecodeGraphs(model) if traced else model.forward
    table = 1 + mx.arange(BATCH * BLOCKS_EACH, dtype=mx.int32).reshape(BATCH, BLOCKS_EACH)
    tokens = mx.arange(BATCH, dtype=mx.int32)
    mx.eval(table, tokens)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    settled, started = 0, 0.0
    overlaps = kv_cache.stores_through
    dispatch, wait = make_dispatch(overlaps), mx.synchronize
    for step in range(steps):
        metadata = DecodeMetadata(
            block_table=table,
            seq_lens=mx.full((BATCH,), step + 1, mx.int32),
            slot_mapping=table[:, step // BLOCK_SIZE] * BLOCK_SIZE + step % BLOCK_SIZE,
            offset=mx.full((BATCH,), step, mx.int32),
            max_seq_len=BLOCKS_EACH * BLOCK_SIZE,
        )
        previous = tokens
        logits = forward(tokens[:, None], [metadata])
        tokens = mx.argmax(logits[:, -1], axis=-1).astype(mx.int32)
        if not overlaps:
            wait()
            previous.tolist()
        wait = dispatch(tokens, kv_cache.arrays)
        if overlaps:
            previous.tolist()
        if step == SETTLED:
            settled, started = mx.get_peak_memory(), time.perf_counter()
    mx.eval(tokens)
    milliseconds = (time.perf_counter() - started) / (steps - SETTLED - 1) * 1e3
    growth, of_a_layer = mx.get_peak_memory() - settled, kv_cache.nbytes // len(backends)
    print(
        f"{backends[0].name}, {'replayed' if traced else 'built'}: peak over the"
        f" {held >> 20} MiB held: {(settled - held) / 2**20:.1f} MiB after {SETTLED} steps,"
        f" {growth / 2**20:+.1f} MiB from there to step {steps};"
        f" pages of a layer: {of_a_layer >> 20} MiB; {milliseconds:.2f} ms a step",
        flush=True,
    )
    copied = growth if turboquant is None else settled - held + growth
    assert copied < of_a_layer, "the pages of a layer were copied"
    assert mx.all(mx.isfinite(logits)).item(), "logits are no numbers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    for turboquant in (TurboQuantConfig(parse_pair("q8_0/q3_0")), None):
        for traced in (False, True):
            run(turboquant, traced, arguments.steps)
            gc.collect()
            mx.clear_cache()


if __name__ == "__main__":
    main()
