"""The texts of the kernels that one layer launches in a step."""

import mlx.core as mx

from tests.kernels.metal_text import PrintingTarget, metal_text
from vllm_metal.metal_kernel_backend.dense.kernels import DenseLauncher
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.paged import kernels as paged
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

LAYOUT = PageLayout.of("q8_0", "q3_0", 128, 2, 16)


def dense_layout(
    dtype: mx.Dtype,
    key_size: int = 128,
    value_size: int = 128,
    heads: int = 2,
    block_size: int = 16,
    padding: int = 0,
) -> DenseLayout:
    """Dense pages with unused bytes at their end."""
    page = block_size * heads * (key_size + value_size) * dtype.size + padding
    return DenseLayout(dtype, key_size, value_size, heads, block_size, page)


def sources(
    layout: PageLayout | DenseLayout,
    heads_per_kv_head: int = 4,
    num_queries: int = 1,
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype] = (mx.float16,) * 3,
    batch: int = 2,
    blocks: int = 3,
    settings: dict | None = None,
    **options,
) -> list[str]:
    """Texts of store, decode, merge and read for one layer and one shape of step.

    `dtypes` are those of keys, values and queries, `options` the launcher's.
    """
    is_dense = isinstance(layout, DenseLayout)
    kind = DenseLauncher if is_dense else Launcher
    launcher = kind(layout, PrintingTarget(), num_cores=8, **options)
    heads, key_size, value_size = layout.num_kv_heads, layout.key_head_size, layout.value_head_size

    def step(pages, keys, values, slots, queries, table, lengths, key_factors, value_factors):
        constants = LayerConstants(key_factors, key_factors, key_factors, value_factors)
        if is_dense:
            constants = paged.LayerConstants()
        token = launcher.store(pages, keys, values, slots, constants)
        output = launcher.decode(
            pages, queries, table, lengths, constants, 0.1, 40, token, **(settings or {})
        )
        return output, *launcher.read(pages, table[0], constants, 0, 3, token, dtypes[2])

    return metal_text(
        step,
        mx.zeros(layout.pages_shape(4), layout.dtype if is_dense else mx.uint16),
        mx.zeros((batch, heads, key_size), dtypes[0]),
        mx.zeros((batch, heads, value_size), dtypes[1]),
        mx.zeros((batch,), mx.int32),
        mx.zeros((batch, num_queries, heads * heads_per_kv_head, key_size), dtypes[2]),
        mx.zeros((batch, blocks), mx.int32),
        mx.zeros((batch,), mx.int32),
        mx.zeros((heads, key_size)),
        mx.zeros((value_size,)),
    )
