"""What the dense kernels are compiled for. Their results: test_fused, paged/test_launcher."""

import re

from vllm_metal.metal_kernel_backend.dense.kernels import FAMILY, LAYOUT_ARGUMENTS
from vllm_metal.metal_kernel_backend.kernel_library import header_source


def test_the_arguments_of_the_layout_are_in_the_order_of_its_parameters():
    text = header_source("dense/layout.h")
    [parameters] = re.findall(r"template <\s*(typename T,[^>]*)>\s*struct DenseLayout", text)
    names = [parameter.split()[-1] for parameter in parameters.split(",")]
    assert names == ["T", *LAYOUT_ARGUMENTS[1:]] and LAYOUT_ARGUMENTS[0] == "ELEMENT"
    assert FAMILY.layout == f"DenseLayout<{', '.join(LAYOUT_ARGUMENTS)}>"
