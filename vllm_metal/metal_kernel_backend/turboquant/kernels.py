"""The TurboQuant kernels as MLX launches them, and what they are told of a format."""

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.paged import constants_header as paged
from vllm_metal.metal_kernel_backend.paged.kernels import (
    AFTER,
    PAGES,
    KernelFamily,
    PageKernels,
    PageReader,
)
from vllm_metal.metal_kernel_backend.turboquant import constants_header
from vllm_metal.metal_kernel_backend.turboquant.constants_header import (
    CODEBOOK_FACTORS,
    CODEBOOK_MIDPOINTS,
)
from vllm_metal.metal_kernel_backend.turboquant.formats import Format

FAMILY = KernelFamily(
    "turboquant",
    (
        (paged.HEADER, paged.constants_header()),
        (constants_header.HEADER, constants_header.constants_header()),
    ),
    "PageLayout<PAGE_LAYOUT_ARGUMENTS>",
)

STORE = FAMILY.kernel(
    "store",
    "store.h",
    "store_vectors<Layout, SIMDGROUPS>",
    (PAGES, "keys", "values", "slot_mapping", "centre", "key_factors", "value_factors")
    + ("key_codebook", "value_codebook", "parameters", AFTER),
    ("token",),
    (("uchar", "codes", "SIMDGROUPS * StoreScratch<Layout>::SIZE"),),
)

READ_BY = "query_factors", "centre", "key_codebook", "value_codebook"
OUTPUT = "RotatedOutput<Layout>", ("centre", "value_factors")

DECODE = FAMILY.decode(PageReader("CompressedReader<Layout>", READ_BY, *OUTPUT))

MATRIX_DECODE = FAMILY.matrix_decode(
    PageReader("CompressedMatrices<Layout, TOKENS / FRAGMENT_TOKENS>", READ_BY, *OUTPUT)
)

MERGE = FAMILY.merge(*OUTPUT)

DEQUANTIZE = FAMILY.kernel(
    "dequantize",
    "dequantize.h",
    "dequantize_tokens<Layout, SIMDGROUPS>",
    (PAGES, "block_table", "centre", "query_factors", "value_factors")
    + ("key_codebook", "value_codebook", "parameters", AFTER),
    ("keys", "values"),
    (("float", "scratch", "SIMDGROUPS * DequantizeScratch<Layout>::SIZE"),),
)

KERNELS = PageKernels(STORE, DECODE, MERGE, DEQUANTIZE, MATRIX_DECODE)


def codebook(format: Format, head_size: int) -> mx.array:
    """What the kernels know of a format: float32, c1 c3 c5 - , 5 scale factors, ..., midpoints."""
    book = np.zeros(CODEBOOK_MIDPOINTS + format.num_codes // 2, np.float32)
    coefficients = format.coefficients(head_size)
    book[: len(coefficients)] = coefficients
    factors = format.scale_factors(head_size)
    book[CODEBOOK_FACTORS : CODEBOOK_FACTORS + len(factors)] = factors
    positive = format.midpoints(head_size)[format.num_codes // 2 :]
    book[CODEBOOK_MIDPOINTS : CODEBOOK_MIDPOINTS + len(positive)] = positive
    return mx.array(book)
