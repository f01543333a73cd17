"""Pages of one layer: as a server allocates them, and dense ones as tests look at them."""

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend, Pages
from vllm_metal.kv_cache.cache import KVCache


def empty_pages(backend: AttentionBackend, num_blocks: int) -> Pages:
    """Pages of a cache with this one layer, full of zeros."""
    return KVCache([backend], num_blocks).pages(0)


def keys_and_values(backend: AttentionBackend, pages: Pages) -> tuple[mx.array, mx.array]:
    """Keys `[num_blocks, H, block_size, Dk]` and values `[num_blocks, H, block_size, Dv]`."""
    shape, array = backend.shape, pages.array
    rows = array.shape[0], shape.num_kv_heads, backend.block_size
    middle = shape.num_kv_heads * backend.block_size * shape.head_size
    end = middle + shape.num_kv_heads * backend.block_size * shape.head_size_v
    return (
        array[:, :middle].reshape(*rows, shape.head_size),
        array[:, middle:end].reshape(*rows, shape.head_size_v),
    )
