"""What the kernels are told of a format. The kernels themselves: test_launcher, tests/kernels."""

import re

import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE, library_source
from vllm_metal.metal_kernel_backend.turboquant.bitpack import GROUP
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    GROUP_SIZE,
    KEY_FORMATS,
    LEVEL_BASE,
    LEVEL_SCALE_FACTORS,
    LEVEL_UNIT,
    NUM_LEVELS,
    SCALE_FACTORS,
)
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import TRIED_LEVELS
from vllm_metal.metal_kernel_backend.turboquant.kernels import (
    CODEBOOK_FACTORS,
    CODEBOOK_MIDPOINTS,
    DECODE,
    DEQUANTIZE,
    MERGE,
    STORE,
    codebook,
)


@pytest.mark.parametrize("format", KEY_FORMATS.values(), ids=lambda format: format.name)
def test_a_codebook_holds_coefficients_factors_and_positive_midpoints(format):
    for size in (64, 128):
        numbers = np.array(codebook(format, size))
        assert numbers.dtype == np.float32 and numbers.size >= 8
        terms = numbers[: format.num_terms(size)]
        np.testing.assert_array_equal(terms, format.coefficients(size))
        factors = numbers[CODEBOOK_FACTORS:][: len(format.scale_factors(size))]
        np.testing.assert_array_equal(factors, format.scale_factors(size))
        positive = format.midpoints(size)[format.num_codes // 2 :]
        np.testing.assert_array_equal(numbers[CODEBOOK_MIDPOINTS:][: len(positive)], positive)


def test_python_and_metal_agree_on_every_whole_number_that_both_hold():
    [num_scales] = {len(factors) for factors in (*SCALE_FACTORS.values(), LEVEL_SCALE_FACTORS)}
    constants = re.findall(
        r"^constant constexpr int (\w+) = (.*?);", library_source("turboquant"), re.MULTILINE
    )
    assert dict(constants) == {
        "SIMD_SIZE": str(SIMD_SIZE),
        "CHUNK": str(GROUP),
        "NUM_LEVELS": str(NUM_LEVELS),
        "LEVEL_BASE": str(LEVEL_BASE),
        "TRIED_LEVELS": str(TRIED_LEVELS),
        "CODEBOOK_FACTORS": str(CODEBOOK_FACTORS),
        "CODEBOOK_MIDPOINTS": str(CODEBOOK_MIDPOINTS),
        "NUM_SCALES": str(num_scales),
    }


def test_the_parts_of_a_codebook_do_not_overlap():
    assert GROUP_SIZE == GROUP and f"LEVEL_UNIT = {LEVEL_UNIT}f;" in library_source("turboquant")
    for format in KEY_FORMATS.values():
        assert format.num_terms(64) <= CODEBOOK_FACTORS
        assert CODEBOOK_FACTORS + len(format.scale_factors(64)) <= CODEBOOK_MIDPOINTS


def test_names_of_buffers_are_words_of_their_own():
    """MLX looks for `<name>_shape` and the like as substrings of a body, and adds buffers."""
    for kernel in (STORE, DECODE, MERGE, DEQUANTIZE):
        for name in kernel.input_names:
            for suffix in ("_shape", "_strides", "_ndim"):
                assert name + suffix not in kernel.body
