"""What the kernels are told of a format. The kernels: `paged/test_kernels`, `test_launcher`."""

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.turboquant.constants_header import (
    CODEBOOK_FACTORS,
    CODEBOOK_MIDPOINTS,
)
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.kernels import codebook


@pytest.mark.parametrize("format", KEY_FORMATS.values(), ids=lambda format: format.name)
def test_a_codebook_holds_coefficients_factors_and_positive_midpoints(format):
    for size in (64, 128):
        book = np.array(codebook(format, size))
        assert book.dtype == np.float32 and book.size >= 8
        terms = book[: format.num_terms(size)]
        np.testing.assert_array_equal(terms, format.coefficients(size))
        factors = book[CODEBOOK_FACTORS:][: len(format.scale_factors(size))]
        np.testing.assert_array_equal(factors, format.scale_factors(size))
        positive = format.midpoints(size)[format.num_codes // 2 :]
        np.testing.assert_array_equal(book[CODEBOOK_MIDPOINTS:][: len(positive)], positive)


def test_the_parts_of_a_codebook_do_not_overlap():
    for format in KEY_FORMATS.values():
        assert format.num_terms(64) <= CODEBOOK_FACTORS
        assert CODEBOOK_FACTORS + len(format.scale_factors(64)) <= CODEBOOK_MIDPOINTS
