"""The bodies of the kernels of all pages. The kernels themselves: the launchers, tests/kernels."""

import re

import pytest

from vllm_metal.metal_kernel_backend.dense import kernels as dense
from vllm_metal.metal_kernel_backend.paged.kernels import AFTER, KernelFamily
from vllm_metal.metal_kernel_backend.turboquant import kernels as turboquant

KERNELS = (*turboquant.KERNELS, *dense.KERNELS)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_body_passes_every_buffer_but_the_token_of_an_earlier_store(kernel):
    """Those of constants in structs, in front of the parameters."""
    passed = kernel.body[kernel.body.index("(\n") :].strip("(\n);").replace("\n", " ").split(", ")
    passed = [name.strip() for name in passed]
    structs = re.findall(r"const typename \S+ (\w+) = \{(.*?)\};", kernel.body)
    if structs:
        first = passed.index("parameters") - len(structs)
        assert passed[first : first + len(structs)] == [name for name, _ in structs]
        members = ", ".join(text for _, text in structs if text).split(", ")
        passed[first : first + len(structs)] = dict.fromkeys(filter(None, members))
    buffers = [name for name in kernel.input_names if name != AFTER] + list(kernel.output_names)
    assert passed[: len(buffers)] == buffers
    assert passed[-1] == "thread_index_in_simdgroup"


def test_names_of_buffers_are_words_of_their_own():
    """MLX looks for `<name>_shape` and the like as substrings of a body, and adds buffers."""
    for kernel in KERNELS:
        for name in kernel.input_names:
            for suffix in ("_shape", "_strides", "_ndim"):
                assert name + suffix not in kernel.body


@pytest.mark.parametrize("kernels", [turboquant.KERNELS, dense.KERNELS])
def test_pages_are_large_inputs(kernels):
    for kernel in kernels:
        if kernel is kernels.merge:
            continue
        assert kernel.large_inputs == ("pages",) and AFTER in kernel.input_names
    assert kernels.merge.large_inputs == ()


def test_a_family_names_its_kernels_and_their_headers():
    family = KernelFamily("family", (("family/constants.h", "// constants"),), "Layout<A>")
    kernel = family.kernel("f", "f.h", "f<Layout>", ("x", "parameters"), ("y",))
    assert (kernel.name, kernel.header) == ("family_f", "family/f.h")
    assert "using Layout = Layout<A>;" in kernel.body and "constants" not in kernel.body
