"""The kernels of dense pages as MLX launches them, and their launcher."""

from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.paged import constants_header
from vllm_metal.metal_kernel_backend.paged.kernels import (
    AFTER,
    PAGES,
    KernelFamily,
    PageKernels,
    PageReader,
)
from vllm_metal.metal_kernel_backend.paged.launcher import PageLauncher

LAYOUT_ARGUMENTS = [
    name for name, _ in DenseLayout(mx.float16, 64, 64, 1, 8, 8 * 2 * 128).template()
]

FAMILY = KernelFamily(
    "dense",
    ((constants_header.HEADER, constants_header.constants_header()),),
    f"DenseLayout<{', '.join(LAYOUT_ARGUMENTS)}>",
)

STORE = FAMILY.kernel(
    "store",
    "store.h",
    "store_vectors<Layout, SIMDGROUPS>",
    (PAGES, "keys", "values", "slot_mapping", "parameters", AFTER),
    ("token",),
)

GATHER = FAMILY.kernel(
    "gather",
    "gather.h",
    "gather_tokens<Layout, SIMDGROUPS>",
    (PAGES, "block_table", "parameters", AFTER),
    ("keys", "values"),
)

KERNELS = PageKernels(
    STORE,
    FAMILY.decode(PageReader("DenseReader<Layout>", (), "DenseOutput<Layout>", ())),
    FAMILY.merge("DenseOutput<Layout>", ()),
    GATHER,
)


@dataclass
class DenseLauncher(PageLauncher[DenseLayout]):
    """The kernels of one `DenseLayout` on one target."""

    kernels = KERNELS
