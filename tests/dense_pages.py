"""Dense pages as tests look at them."""

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Pages


def keys_and_values(backend: AttentionBackend, pages: Pages) -> tuple[mx.array, mx.array]:
    """Keys `[num_blocks, H, block_size, Dk]` and values `[num_blocks, H, block_size, Dv]`."""
    shape, array = backend.shape, pages[0]
    rows = array.shape[0], shape.num_kv_heads, backend.block_size
    middle = shape.num_kv_heads * backend.block_size * shape.head_size
    end = middle + shape.num_kv_heads * backend.block_size * shape.head_size_v
    return (
        array[:, :middle].reshape(*rows, shape.head_size),
        array[:, middle:end].reshape(*rows, shape.head_size_v),
    )
