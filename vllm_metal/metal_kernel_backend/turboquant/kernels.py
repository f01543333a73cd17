"""The TurboQuant kernels as MLX launches them: names of buffers and bodies.

A body names the page layout, declares threadgroup memory, and calls one function of the kernel's
header with the buffers in the order in which they are declared here, the threadgroup memory and the
place in the grid.
"""

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.kernel_library import Kernel
from vllm_metal.metal_kernel_backend.turboquant.constants_header import (
    CODEBOOK_FACTORS,
    CODEBOOK_MIDPOINTS,
    constants_header,
)
from vllm_metal.metal_kernel_backend.turboquant.formats import Format

AFTER = "after"
"""The input of every kernel that touches pages which the kernel does not read: the token of an
earlier store, bound so that the GPU runs this kernel after it."""

PAGES = "pages"

BODY = """
  using Layout = PageLayout<PAGE_LAYOUT_ARGUMENTS>;
{arrays}
  {function}(
      {arguments},
      threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""


def _kernel(
    name: str,
    header: str,
    function: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    arrays: tuple[tuple[str, str, str], ...],
) -> Kernel:
    """A kernel that calls `function`.

    Args:
        name: of the kernel.
        header: in `kernels/turboquant`.
        function: with its template arguments.
        inputs: in the order of the function's parameters; `AFTER`, where there, is not passed.
        outputs: likewise, behind the inputs.
        arrays: threadgroup memory, passed behind the outputs: (type, name, length) of each.
    """
    buffers = [*(name for name in inputs if name != AFTER), *outputs]
    body = BODY.format(
        arrays="\n".join(f"  threadgroup {kind} {array}[{size}];" for kind, array, size in arrays),
        function=function,
        arguments=", ".join([*buffers, *(array for _, array, _ in arrays)]),
    )
    return Kernel(
        f"turboquant_{name}",
        f"turboquant/{header}",
        constants_header(),
        inputs,
        outputs,
        body,
        large_inputs=tuple(name for name in inputs if name == PAGES),
    )


STORE = _kernel(
    "store",
    "store.h",
    "store_vectors<Layout, SIMDGROUPS>",
    (PAGES, "keys", "values", "slot_mapping", "centre", "key_factors", "value_factors")
    + ("key_codebook", "value_codebook", "parameters", AFTER),
    ("token",),
    (("uchar", "codes", "SIMDGROUPS * StoreScratch<Layout>::SIZE"),),
)

ATTENTION = "Decode<Layout, G, Q, R, TOKENS, SIMDGROUPS, SOFTCAP>"

DECODE = _kernel(
    "decode",
    "decode/decode.h",
    f"{ATTENTION}::run",
    (PAGES, "queries", "query_factors", "centre", "block_table", "seq_lens")
    + ("key_codebook", "value_codebook", "parameters", AFTER),
    ("partials", "states"),
    (
        ("uint4", "query_rows", f"{ATTENTION}::QUERY_MEMORY"),
        ("float", "scratch", f"{ATTENTION}::SCRATCH"),
    ),
)

MATRICES = "MatrixDecode<Layout, G, Q, R, TOKENS, SIMDGROUPS, SOFTCAP>"

MATRIX_DECODE = _kernel(
    "matrix_decode",
    "decode/matrix.h",
    f"{MATRICES}::run",
    DECODE.input_names,
    DECODE.output_names,
    (("uint4", "memory", f"{MATRICES}::MEMORY"),),
)
"""Decode by products of matrices."""

MERGE = _kernel(
    "merge",
    "merge.h",
    "merge_splits<Layout, G, Q, SIMDGROUPS, SINKS>",
    ("partials", "states", "queries", "centre", "value_factors", "seq_lens", "sinks")
    + ("parameters",),
    ("output",),
    (("float", "scratch", "Merge<Layout, G, Q, SIMDGROUPS>::SCRATCH"),),
)

DEQUANTIZE = _kernel(
    "dequantize",
    "dequantize.h",
    "dequantize_tokens<Layout, SIMDGROUPS>",
    (PAGES, "block_table", "centre", "query_factors", "value_factors")
    + ("key_codebook", "value_codebook", "parameters", AFTER),
    ("keys", "values"),
    (("float", "scratch", "SIMDGROUPS * DequantizeScratch<Layout>::SIZE"),),
)


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
