"""What Python tells the kernels of all pages: one text, in the kernels and in the file."""

import pytest

from vllm_metal.metal_kernel_backend.dense import kernels as dense
from vllm_metal.metal_kernel_backend.kernel_library import KERNELS, library_text
from vllm_metal.metal_kernel_backend.paged import constants_header, parameters
from vllm_metal.metal_kernel_backend.paged.constants_header import HEADER, declared
from vllm_metal.metal_kernel_backend.turboquant import kernels as turboquant


def test_the_file_for_editors_is_what_python_writes():
    assert (KERNELS / HEADER).read_text() == constants_header.constants_header()


@pytest.mark.parametrize("family", [dense, turboquant])
def test_every_kernel_has_the_constants_and_the_structs(family):
    for kernel in family.KERNELS:
        text = library_text(kernel)
        assert text.count("constant constexpr int TOKEN_WORDS = 8;\n") == 1
        for struct in (parameters.STORE, parameters.DECODE, parameters.READ):
            assert text.count(f"struct {struct.name} {{") == 1


def test_whole_numbers_and_others():
    assert declared({"A": 3, "B": 0.25}) == (
        "constant constexpr int A = 3;\nconstant constexpr float B = 0.25f;\n"
    )
