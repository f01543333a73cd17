"""How many command buffers a decode step takes on a Mac, by what the kernels bind of their pages.

    python benchmarks/command_buffers.py

A model, not a measurement. MLX's Metal backend sends what it has encoded to the GPU after so many
operations, and as soon as the arrays bound since the last time have so many elements, each buffer
counted once, whether a kernel reads all of it or not (`CommandEncoder::needs_commit`). Here a step
has the operations of a Qwen3-0.6B with 4-bit weights.
"""

from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

LAYERS = 28
LAYOUT = PageLayout.of("q8_0", "q3_0", 128, num_kv_heads=8, block_size=16)
OTHER_OPERATIONS = 22
"""Of a layer, beside store, decode and merge."""
WEIGHTS = 440_000_000 // LAYERS // 8
"""Elements of a layer's weights: 8 in a word."""
MAX_OPERATIONS, MAX_ELEMENTS = 40, 41 << 20
"""MLX's limits on most chips. Elements are counted in whole units of 2^20, of which 40 are let
through."""


def command_buffers(page_elements: int) -> int:
    """Command buffers of one step whose kernels bind so many elements of each layer's pages."""
    sent = operations = elements = 0
    other = [WEIGHTS // OTHER_OPERATIONS] * (OTHER_OPERATIONS // 2)
    for _ in range(LAYERS):
        pages_bound = False  # another layer's are another buffer
        for bound in [*other, "store", "decode", "merge", *other]:
            operations += 1
            if bound in ("store", "decode"):
                elements += 0 if pages_bound else page_elements
                pages_bound = True
            elif bound != "merge":
                elements += bound
            if operations > MAX_OPERATIONS or elements >= MAX_ELEMENTS:
                sent += 1
                operations = elements = 0
                pages_bound = False
    return sent


def main() -> None:
    print("GiB of pages   whole pages bound   first row bound")
    for gib in (1, 2, 4, 8, 16):
        whole = (gib << 30) // LAYERS // 2
        row = LAYOUT.page_size_bytes // 2
        print(f"{gib:12} {command_buffers(whole):19} {command_buffers(row):17}")


if __name__ == "__main__":
    main()
