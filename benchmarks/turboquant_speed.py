"""Decode speed of TurboQuant without kernels, against dense pages, side by side in one run.

    python benchmarks/turboquant_speed.py [--model FOLDER] [--output FILE]

Batch 1, weights in float32, on MLX operations (what serves where there is no GPU). The two caches
take turns, step by step; the ratio is that of the median times. Beside it stands the ratio of the
processor time, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # what `register` sets for the engine

from vllm_metal.machine.blas import load_fast_blas

BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402

from vllm_metal.attention.metadata import DecodeMetadata  # noqa: E402
from vllm_metal.commands.demo_model import fetch_demo_model  # noqa: E402
from vllm_metal.kv_cache.cache import KVCache  # noqa: E402
from vllm_metal.machine.provenance import provenance  # noqa: E402
from vllm_metal.metal_kernel_backend.selection import (  # noqa: E402
    make_backends,
    neutral_constants,
)
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig  # noqa: E402
from vllm_metal.metal_kernel_backend.turboquant.formats import (  # noqa: E402
    FormatPair,
    parse_pair,
)
from vllm_metal.model.decode_graphs import DecodeGraphs  # noqa: E402
from vllm_metal.model.model_binding import ModelBinding  # noqa: E402

BLOCK_SIZE = 16
CONTEXTS = (128, 1000, 4000)
PAIRS = (parse_pair("q8_0/q3_0"), parse_pair("q4_0/q4_0"))


class Decoder:
    """Decode steps at one context length over pages of one kind; their content does not matter."""

    def __init__(self, binding: ModelBinding, pair: FormatPair | None, context: int):
        config = None if pair is None else TurboQuantConfig(pair)
        constants = neutral_constants(binding.layers)
        backends = make_backends(binding.layers, BLOCK_SIZE, mx.float32, config, constants)
        num_blocks = -(-context // BLOCK_SIZE)
        self.kv_cache = KVCache(backends, num_blocks + 1)
        self._graphs = DecodeGraphs(binding.bind(self.kv_cache))
        self._metadata = DecodeMetadata(
            block_table=mx.arange(1, num_blocks + 1)[None],
            seq_lens=mx.array([context]),
            slot_mapping=mx.array([context - 1 + BLOCK_SIZE]),
            offset=context - 1,
            max_seq_len=context,
        )
        self.wall: list[float] = []
        self.processor: list[float] = []
        for _ in range(3):  # built, traced, replayed
            self.step()
        self.wall.clear()
        self.processor.clear()

    def step(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        logits = self._graphs(mx.array([[11]]), [self._metadata])
        mx.eval(mx.argmax(logits, axis=-1), self.kv_cache.arrays)
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def measure(binding: ModelBinding, context: int, steps: int) -> dict:
    dense = Decoder(binding, None, context)
    compressed = {pair: Decoder(binding, pair, context) for pair in PAIRS}
    for _ in range(steps):
        for decoder in (dense, *compressed.values()):
            decoder.step()
    return {
        "dense_ms": round(1000 * statistics.median(dense.wall), 2),
        **{
            str(pair): {
                "ms": round(1000 * statistics.median(decoder.wall), 2),
                "ratio": _ratio(dense.wall, decoder.wall),
                "ratio_of_processor_time": _ratio(dense.processor, decoder.processor),
            }
            for pair, decoder in compressed.items()
        },
    }


def _ratio(dense: list[float], compressed: list[float]) -> float:
    return round(statistics.median(dense) / statistics.median(compressed), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()
    model, _ = mlx_lm.load(args.model or str(fetch_demo_model()))
    model.set_dtype(mx.float32)
    binding = ModelBinding(model)
    figures = {
        **provenance("mlx", "mlx-lm", "torch"),
        "blas": BLAS,
        "steps": args.steps,
        "contexts": {str(n): measure(binding, n, args.steps) for n in args.contexts},
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
