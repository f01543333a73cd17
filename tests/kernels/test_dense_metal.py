"""Instantiations of the dense kernels compile, in the text that MLX generates."""

from itertools import product

import mlx.core as mx
import pytest

from tests.kernels.launched import dense_layout, sources
from tests.kernels.metal_text import compile_errors, for_clang, joined
from tests.kernels.test_turboquant_metal import check, kernel_names

pytest.importorskip("ziglang", reason="clang comes from the package ziglang (extra: test)")

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
SIZES = [(64, 64), (128, 128), (192, 128), (36, 20), (5, 7), (256, 256), (512, 320)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_kind_of_head_size(dtype):
    texts = []
    for key_size, value_size in SIZES:
        layout = dense_layout(dtype, key_size, value_size, heads=3)
        texts += sources(layout, dtypes=(dtype,) * 3)
    check(texts)


@pytest.mark.parametrize("padding", [2, 4, 8])
def test_pages_of_every_alignment(padding):
    check(sources(dense_layout(mx.float16, padding=padding)))


def test_keys_values_and_queries_of_other_types_than_the_pages():
    texts = []
    for dtypes in product(DTYPES, repeat=2):
        texts += sources(dense_layout(mx.bfloat16), dtypes=(*dtypes, dtypes[0]))
    check(texts)


@pytest.mark.parametrize("num_queries", [1, 3, 8])
def test_numbers_of_query_rows_sinks_and_soft_caps(num_queries):
    texts = []
    for heads, max_rows in product((1, 2, 3, 5, 8, 12), (4, 8)):
        texts += sources(dense_layout(mx.float16), heads, num_queries, max_rows=max_rows)
    sinks = {"sinks": mx.zeros((8,)), "softcap": 30.0}
    check(texts + sources(dense_layout(mx.float16), settings=sinks))


def test_one_variant_of_each_kernel_whatever_the_batch_and_the_table():
    names = set()
    layout = dense_layout(mx.float16, 8, 8, heads=1, block_size=8)
    for batch, blocks in product((1, 2, 7, 8, 16), (1, 7, 8, 20)):
        names |= kernel_names(sources(layout, 1, batch=batch, blocks=blocks))
    assert len(names) == 4


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("const device T* keys;", "const T* keys;"),
        ("void load(const device T* vector, int first)", "void load(const T* vector, int first)"),
        ("T(broken ? 0.0f : float(value[i]))", "T(broken ? 0.0 : value[i])"),
        ("const threadgroup float* query_chunk, int,", "const device float* query_chunk, int,"),
    ],
)
def test_planted_errors_are_caught(right, wrong):
    programs = joined(sources(dense_layout(mx.float16)))
    program = next(program for program in programs if right in program)
    assert compile_errors(for_clang(program)) == ""
    assert "error" in compile_errors(for_clang(program.replace(right, wrong, 1)))
