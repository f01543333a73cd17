"""No array of a kernel stays in the memory of a thread when clang optimises it, on any target.

The normal run compiles a few instantiations that cover every way in which the kernels are written:
codebooks of each degree, levels, biases, odd and even widths, head sizes of one and of several
blocks, numbers of lanes and of rows, both forms of decode. The nightly one compiles the product.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import mlx.core as mx
import pytest

from tests.kernels.launched import LAYOUT, dense_layout, sources
from tests.kernels.llvm_ir import left_in_memory
from tests.kernels.metal_text import joined
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget, MetalTarget
from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

pytest.importorskip("ziglang", reason="clang comes from the package ziglang (extra: test)")

COVERING = [
    (LAYOUT, {"heads_per_kv_head": 4, "run_tokens": 2}),
    (
        LAYOUT,
        {"heads_per_kv_head": 8, "run_tokens": 4, "settings": {"softcap": 30.0}, "matrix": None},
    ),
    (
        PageLayout.of("q6_0", "q4_0", 80, 2, 8),
        {"heads_per_kv_head": 6, "max_rows": 4, "matrix": None},
    ),
    (PageLayout.of("q4_0", "q5_0", 256, 2, 16), {"heads_per_kv_head": 2, "num_queries": 3}),
    (
        replace(PageLayout.of("uint4", "q2_0", 64, 2, 16), value_head_size=96),
        {"heads_per_kv_head": 3, "settings": {"sinks": mx.zeros((6,)), "window": 9}},
    ),
    (PageLayout.of("q3_0", "q6_0", 32, 2, 16), {"heads_per_kv_head": 1}),
    (PageLayout.of("q5_0", "q8_0", 512, 1, 8), {"heads_per_kv_head": 5}),
    (LAYOUT, {"heads_per_kv_head": 8}),
    (LAYOUT, {"heads_per_kv_head": 8, "matrix": MatrixForm(1, 16, 6)}),
    (
        PageLayout.of("q6_0", "q3_0", 64, 2, 8),
        {"heads_per_kv_head": 6, "num_queries": 3, "matrix": MatrixForm(1, 16, 6)},
    ),
    (
        PageLayout.of("uint4", "q6_0", 80, 2, 16),
        {"heads_per_kv_head": 5, "settings": {"sinks": mx.zeros((10,)), "softcap": 9.0}},
    ),
    (PageLayout.of("q5_0", "q5_0", 32, 2, 16), {"heads_per_kv_head": 9}),
    (PageLayout.of("q3_0", "q2_0", 256, 2, 16), {"matrix": MatrixForm(1, 8, 6)}),
    (dense_layout(mx.float16), {"heads_per_kv_head": 4, "run_tokens": 2}),
    (dense_layout(mx.bfloat16), {"heads_per_kv_head": 8, "run_tokens": 4, "num_queries": 3}),
    (
        dense_layout(mx.float32, 80, 64),
        {"heads_per_kv_head": 6, "settings": {"sinks": mx.zeros((12,)), "softcap": 9.0}},
    ),
    (dense_layout(mx.bfloat16, 36, 7), {"heads_per_kv_head": 3, "settings": {"window": 9}}),
    (dense_layout(mx.float16, 512, 320, heads=1), {"heads_per_kv_head": 5}),
]


def check(texts: list[str]) -> None:
    for program in joined(texts):
        for variables in left_in_memory(program):
            assert variables == []


def matrix_forms(head_size: int) -> list[MatrixForm]:
    """Those of all targets for pages of that head size, with any number of rows."""
    of_targets = [MatrixForm.of(target, head_size) for target in (MetalTarget(), CudaTarget())]
    return [replace(form, least_rows=1) for form in of_targets if form]


@pytest.mark.parametrize(("layout", "options"), COVERING)
def test_a_covering_set(layout, options):
    check(sources(layout, **options))


@pytest.mark.nightly
@pytest.mark.parametrize("k_quant", KEY_FORMATS)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_every_pair_of_formats(k_quant, head_size):
    texts = []
    forms = matrix_forms(head_size)
    for v_quant in VALUE_FORMATS:
        layout = PageLayout.of(k_quant, v_quant, head_size, 2, 16)
        for tokens in (2, 4):
            texts += sources(layout, run_tokens=tokens, max_rows=4, matrix=None)
        for form in forms:
            texts += sources(layout, matrix=form)
    check(texts)


@pytest.mark.nightly
@pytest.mark.parametrize("heads", range(1, 9))
def test_every_number_of_query_rows(heads):
    texts = []
    for head_size, num_queries, max_rows, run_tokens in product((64, 128), (1, 4), (4, 8), (2, 4)):
        layout = PageLayout.of("q8_0", "q3_0", head_size, 2, 16)
        options = {"max_rows": max_rows, "run_tokens": run_tokens, "matrix": None}
        texts += sources(layout, heads, num_queries, **options)
        texts += sources(layout, heads, num_queries, matrix=MatrixForm(1, 4 * run_tokens, 6))
    check(texts)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("head_size", [8, 20, 64, 72, 80, 96, 128, 192, 256, 512])
def test_dense_pages_of_every_head_size(dtype, head_size):
    texts = []
    for heads, run_tokens in product((1, 3, 4, 8), (2, 4)):
        layout = dense_layout(dtype, head_size, head_size)
        texts += sources(layout, heads, run_tokens=run_tokens)
    check(texts)


@cache
def decode_program(layout: PageLayout | DenseLayout = LAYOUT, form: str = "Decode") -> str:
    """That of a layout; `form` is the struct that it calls."""
    heads = 8 if form == "MatrixDecode" else 4
    programs = joined(sources(layout, heads, run_tokens=2))
    [program] = (x for x in programs if f"struct {form} " in x)
    return program


PLANTED = {
    "a choice of elements in place of a choice of values": (
        "float low = v[i], high = v[i + n];\n"
        "float kept = upper ? high : low, sent = upper ? low : high;",
        "float kept = upper ? v[i + n] : v[i], sent = upper ? v[i] : v[i + n];",
    ),
    "an index that a function of Metal's library gives": (
        "return score / TOKENS < R ? score / TOKENS : R - 1;",
        "return min(score / TOKENS, R - 1);",
    ),
    "an index that depends on the lane": ("weights[2 * r]", "weights[2 * r ^ (lane & 1)]"),
}


PLANTED_IN_DENSE = {
    "an element whose place the lane decides": (
        "a = pair.a.at(i);",
        "a = pair.a.at(int(pair.b.at(i)) & (LANE_ELEMENTS - 1));",
    ),
    "a token that is cleared at a place unknown": (
        "values.clear(i);",
        "values.clear((i + token) & (TOKENS - 1));",
    ),
}


PLANTED_IN_MATRICES = {
    "a code whose place the lane decides": (
        "HALVED ? halves[n].point(i % 8)",
        "HALVED ? halves[n].point((i + lane) % 8)",
    ),
    "a weight whose place the lane decides": (
        "own[1].sum += summands[n][1];",
        "own[1].sum += summands[n][lane & 1];",
    ),
}


@pytest.mark.parametrize("name", PLANTED_IN_MATRICES)
def test_planted_arrays_in_the_memory_of_the_matrix_form_are_found(name):
    layout = PageLayout.of("q8_0", "q4_0", 64, 2, 16)
    found_in(decode_program(layout, "MatrixDecode"), *PLANTED_IN_MATRICES[name])


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("layout", [LAYOUT, dense_layout(mx.float16)], ids=["q8_0/q3_0", "dense"])
def test_planted_arrays_in_memory_are_found(name, layout):
    found_in(decode_program(layout), *PLANTED[name])


@pytest.mark.parametrize("name", PLANTED_IN_DENSE)
def test_planted_arrays_in_the_memory_of_dense_kernels_are_found(name):
    found_in(decode_program(dense_layout(mx.bfloat16)), *PLANTED_IN_DENSE[name])


def found_in(program: str, right: str, wrong: str) -> None:
    program = program.replace("METAL_FUNC constexpr int row_of", "METAL_FUNC int row_of")
    assert right in program and left_in_memory(program) == [[]]
    [variables] = left_in_memory(program.replace(right, wrong))
    assert variables
