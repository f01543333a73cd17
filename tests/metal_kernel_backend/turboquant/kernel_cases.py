"""The instantiations of the kernels that test_launcher.py runs."""

import os
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_kernel_backend.turboquant.stored_requests import FORMS, Case
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS

CASES = [
    Case("q8_0", "q3_0", 128, 2, 16, 4),
    Case("q8_0", "q8_0", 64, 3, 16, 3, mx.float32, {"num_cores": 16}),
    Case("q6_0", "q4_0", 80, 1, 8, 6, mx.bfloat16, {"max_rows": 4}),
    Case("q5_0", "q2_0", 96, 2, 32, 1, mx.float16, {"num_cores": 16}),
    Case("q4_0", "q3_0", 256, 1, 16, 8, mx.float16, {"num_cores": 16}),
    Case("q3_0", "q5_0", 112, 1, 16, 2, mx.bfloat16, {"run_tokens": 2}),
    Case("q2_0", "q6_0", 64, 1, 8, 12),
    Case("int8", "q4_0", 160, 1, 16, 2, mx.float16, {"run_tokens": 2}),
    Case("int4", "q3_0", 32, 2, 32, 4),
    Case("int2", "q2_0", 128, 1, 16, 8, mx.float16, {"max_rows": 4, "run_tokens": 2}),
    Case("uint8", "q5_0", 64, 1, 16, 1, mx.float16, {"num_cores": 16}),
    Case("uint4", "q6_0", 192, 1, 16, 2),
    Case("q6_0", "q8_0", 160, 1, 16, 2, mx.bfloat16),
    Case("q5_0", "q4_0", 512, 1, 8, 2),
    Case("uint2", "q8_0", 128, 1, 8, 1, mx.float32),
    Case("q8_0", "q4_0", 192, 2, 16, 2, head_size_v=128, padding=48),
    Case("uint4", "q3_0", 64, 3, 8, 4, mx.float32, head_size_v=96, padding=16),
    Case("q6_0", "q5_0", 64, 1, 8, 3, mx.float32, value_dtype=mx.bfloat16),
    Case("q4_0", "q2_0", 128, 1, 16, 1, mx.float16, value_dtype=mx.float32),
]
"""Every format, head size, block size, number of query heads and type in one case or another, keys
longer than values, the reverse, padded pages, and values of another type than keys."""


def random_cases(count: int) -> list[Case]:
    """Cases drawn from the whole product, the same for the same count."""
    rng = np.random.default_rng(count)

    def one(values):
        return values[rng.integers(len(values))]

    return [
        Case(
            one(list(KEY_FORMATS)),
            one(list(VALUE_FORMATS)),
            one([64, 80, 96, 112, 128, 160, 192, 256]),
            one([1, 2, 3]),
            one([8, 16, 32]),
            one([1, 2, 4, 6, 8, 12]),
            one([mx.float16, mx.bfloat16, mx.float32]),
            {"max_rows": one([1, 2, 4, 8]), "run_tokens": one([2, 4])},
            head_size_v=one([0, 0, 0, 64, 128]),
            padding=one([0, 0, 16, 4096]),
            value_dtype=one([None, None, mx.float16, mx.bfloat16, mx.float32]),
        )
        for _ in range(count)
    ]


def product_cases(part: str) -> list[Case]:
    """Part i of n, as "i/n", of the product of formats, head sizes, blocks and query heads."""
    if not part:
        return []
    i, n = map(int, part.split("/"))
    pages = list(product(KEY_FORMATS, VALUE_FORMATS, (64, 80, 96, 128, 256), (8, 16, 32)))
    dtypes = mx.float16, mx.bfloat16, mx.float32
    return [
        Case(k_quant, v_quant, size, 1, block, heads, dtypes[j % 3], {"run_tokens": 2 + j % 2 * 2})
        for k_quant, v_quant, size, block in pages[i::n]
        for j, heads in enumerate((1, 2, 4, 6, 8, 12))
    ]


NORMAL = {
    "scalar": (0, 3, 6, 9, 12, 15, 18),
    "matrix": (4, 12),
    "matrix-16": (3, 15),
    "tensor-cores": (0, 6),
    "tensor-cores-8": (9, 14),
}
"""Which of `CASES` the normal run takes in each form; the nightly run takes all in every form."""


def kernel_cases() -> list:
    """The cases in every form, further ones in one form each.

    KERNEL_CASES=200 adds as many random instantiations; KERNEL_PRODUCT=0/96 means a part of the
    product alone (`benchmarks/kernel_product.sh`).
    """
    product_part = product_cases(os.environ.get("KERNEL_PRODUCT", ""))
    further = product_part or random_cases(int(os.environ.get("KERNEL_CASES", "0")))
    forms = list(FORMS)
    chosen = [(case, forms[i % len(forms)], True) for i, case in enumerate(further)]
    if not product_part:
        every = product(enumerate(CASES), FORMS)
        chosen += [(case, form, i in NORMAL[form]) for (i, case), form in every]
    return [
        pytest.param(
            case.of_form(form),
            marks=[] if normal else pytest.mark.nightly,
            id=f"{case}-{form}",
        )
        for case, form, normal in chosen
    ]
