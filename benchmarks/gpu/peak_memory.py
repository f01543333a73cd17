"""Peak memory over 500 asynchronous steps of a 16-layer stack that stores and decodes in place.

    python benchmarks/gpu/peak_memory.py

Needs MLX on a GPU. Each step's query depends on the step before; the host runs ahead, as a server
does. The pages are written through an input of the store kernel; a copy of them would show.
"""

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import available_target
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout

LAYERS, BATCH, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, BLOCKS = 16, 8, 32, 8, 128, 16, 4096
STEPS = 500


def main() -> None:
    layout = SlotLayout.of("q8_0", "q3_0", HEAD_SIZE, KV_HEADS, BLOCK_SIZE)
    launcher = Launcher(layout, available_target())
    pages = [mx.zeros(layout.pages_shape(BLOCKS), mx.uint16) for _ in range(LAYERS)]
    ones = mx.ones((KV_HEADS, HEAD_SIZE))
    constants = LayerConstants(mx.zeros_like(ones), ones, ones, mx.ones((HEAD_SIZE,)))
    table = 1 + mx.arange(BATCH * 64, dtype=mx.int32).reshape(BATCH, 64)
    tokens = [launcher.no_token()] * LAYERS
    x = mx.random.normal((BATCH, HEADS, HEAD_SIZE)).astype(mx.float16)
    mx.eval(pages, constants.centre, ones, constants.value_factors, table, x)
    held = mx.get_active_memory()
    peaks = {}
    previous = x
    for step in range(STEPS):
        lengths = mx.full((BATCH,), step + 1, mx.int32)
        slots = table[:, step // BLOCK_SIZE] * BLOCK_SIZE + step % BLOCK_SIZE
        for layer in range(LAYERS):
            new = x[:, :KV_HEADS]
            args = pages[layer], new, new, slots, constants, tokens[layer]
            tokens[layer] = launcher.store(*args)
            arguments = constants, HEAD_SIZE**-0.5, step + 1, tokens[layer]
            x = x + launcher.decode(pages[layer], x[:, None], table, lengths, *arguments)[:, 0]
            x = x / mx.max(mx.abs(x))
        mx.async_eval(x)
        mx.eval(previous)
        previous = x
        if step in (20, STEPS - 1):
            peaks[step] = mx.get_peak_memory()
            print(f"step {step}: peak {peaks[step] - held} bytes over the {held} held", flush=True)
    page_bytes = pages[0].nbytes
    growth = peaks[STEPS - 1] - peaks[20]
    assert bool(mx.all(mx.isfinite(x))) and bool(mx.any(pages[-1] != 0))
    assert growth < page_bytes, "the pages of a layer were copied"
    print(f"growth from step 20 to {STEPS - 1}: {growth} bytes; pages of a layer: {page_bytes}")


if __name__ == "__main__":
    main()
