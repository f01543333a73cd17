"""Every instantiation of the TurboQuant kernels compiles, in the text that MLX generates."""

import re
from dataclasses import replace
from functools import cache
from itertools import product

import mlx.core as mx
import pytest

from tests.kernels.launched import LAYOUT, sources
from tests.kernels.metal_text import compile_errors, file_errors, for_clang, joined
from vllm_metal.metal_kernel_backend.kernel_library import KERNELS
from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

pytest.importorskip("ziglang", reason="clang comes from the package ziglang (extra: test)")

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
FILES = sorted(file for file in KERNELS.rglob("*") if file.is_file())


BOTH_FORMS = {"matrix": None}, {"matrix": MatrixForm(1, 8, 6)}
"""Options of a launcher for each form of decode."""


def check(texts: list[str], kinds: int = 4) -> None:
    """All of these programs compile; `kinds` of kernels are among them."""
    programs = joined(texts)
    assert len(programs) == kinds
    for program in map(for_clang, programs):
        uses_memory = not re.search("_dense_(store|gather)_", program)
        kernels = program.count("[[kernel]] void")
        assert program.count("static_assert(sizeof") == (kernels if uses_memory else 0)
        assert compile_errors(program) == ""
        for slots in re.findall(r"\[\[buffer\((\d+)\)\]\]", program):
            assert int(slots) < 31


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(t, marks=[] if t == DTYPES[0] else pytest.mark.nightly) for t in DTYPES],
    ids=str,
)
def test_every_pair_of_formats(dtype):
    texts = []
    for form, k_quant, v_quant in product(BOTH_FORMS, KEY_FORMATS, VALUE_FORMATS):
        layout = PageLayout.of(k_quant, v_quant, 128, 2, 16)
        texts += sources(layout, dtypes=(dtype,) * 3, **form)
    check(texts, 5)


@pytest.mark.parametrize(
    "head_size",
    [
        pytest.param(size, marks=[] if size in (64, 80, 128, 256) else pytest.mark.nightly)
        for size in HEAD_SIZES
    ],
)
def test_every_head_size(head_size):
    texts = []
    for block_size, (k_quant, v_quant) in product(
        (8, 16, 32), [("q8_0", "q3_0"), ("q5_0", "q6_0"), ("uint4", "q2_0")]
    ):
        layout = PageLayout.of(k_quant, v_quant, head_size, 3, block_size)
        for tokens in (2, 4):
            texts += sources(layout, run_tokens=tokens, matrix=None)
            texts += sources(layout, matrix=MatrixForm(1, 4 * tokens, 6))
    check(texts, 5)


@pytest.mark.parametrize("num_queries", range(1, 9))
def test_every_number_of_query_rows(num_queries):
    texts = []
    for heads in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
        for max_rows in (4, 8):
            texts += sources(LAYOUT, heads, num_queries, max_rows=max_rows, matrix=None)
        texts += sources(LAYOUT, heads, num_queries, matrix=MatrixForm(1, 8, 6))
    check(texts, 5)


def test_sinks_softcaps_and_keys_longer_than_values():
    texts = []
    settings = {"softcap": 30.0}, {"window": 8}, {"sinks": mx.zeros((8,))}
    for form, setting, heads in product(BOTH_FORMS, settings, (4, 8)):
        if "sinks" in setting:
            setting = {"sinks": mx.zeros((2 * heads,))}
        texts += sources(LAYOUT, heads, settings=setting, **form)
    for form in BOTH_FORMS:
        texts += sources(replace(LAYOUT, value_head_size=64), **form)
        texts += sources(replace(LAYOUT, key_head_size=64), **form)
    check(texts, 5)


TINY = PageLayout.of("q4_0", "q4_0", 32, 1, 8)
"""The least that a layer can have: its arrays are the shortest."""


def kernel_names(texts: list[str]) -> set[str]:
    return {text.split('host_name("')[1].split('"')[0] for text in texts}


def test_one_variant_of_each_kernel_whatever_the_batch_and_the_table():
    """So nothing is compiled when a request is added or grows: MLX passes arrays of fewer than 8
    elements in another address space and gives the kernel another name."""
    names = set()
    for batch, blocks in product(range(1, 17), range(1, 21)):
        names |= kernel_names(sources(TINY, heads_per_kv_head=1, batch=batch, blocks=blocks))
    assert len(names) == 4
    sinks = [mx.zeros((heads,)) for heads in (1, 8)]
    for batch, sink in product((1, 8), sinks):
        texts = sources(TINY, sink.size, batch=batch, settings={"sinks": sink})
        names |= {name for name in kernel_names(texts) if "_merge_" in name}
    assert len(names) == 4 + len(sinks)


def test_arrays_of_every_length_compile():
    for batch in (1, 8):
        check(sources(TINY, heads_per_kv_head=1, batch=batch, blocks=1))


def test_keys_values_and_queries_of_different_types():
    texts = []
    for form, *dtypes in product(BOTH_FORMS, *[DTYPES] * 3):
        texts += sources(LAYOUT, dtypes=dtypes, **form)
    check(texts, 5)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_compiles_alone(file):
    """Each includes what it needs. The top file makes no kernel by itself, so it takes all."""
    assert file.suffix in (".h", ".metal")
    assert file_errors(file) == ""


def test_a_file_that_lacks_an_include_does_not_compile_alone(tmp_path):
    text = (KERNELS / "paged/lanes.h").read_text()
    (tmp_path / "lanes.h").write_text(text.replace('#include "paged/base.h"\n', ""))
    assert "error" in file_errors(tmp_path / "lanes.h")


@cache
def programs() -> list[str]:
    return joined([text for form in BOTH_FORMS for text in sources(LAYOUT, **form)])


PLANTED = {
    "a lost device": (
        "const device uchar* page, uint slot, int key_chunk, int own_pair) thread",
        "const uchar* page, uint slot, int key_chunk, int own_pair) thread",
    ),
    "a double": ("float softcap = decode.softcap;", "double softcap = decode.softcap;"),
    "a double literal": ("float x = float(steps) + 0.5f;", "float x = float(steps) + 0.5;"),
    "threadgroup memory taken for device memory": (
        "const threadgroup typename Reader::Query* query_chunk =",
        "const device typename Reader::Query* query_chunk =",
    ),
    "device memory where MLX passes constant memory": (
        "const thread typename Output::Constants& constants, const constant int* parameters,",
        "const thread typename Output::Constants& constants, const device int* parameters,",
    ),
    "a threadgroup array in a helper": (
        "float largest = 0.0f, total = 0.0f;",
        "threadgroup float buffer[32]; float largest = 0.0f, total = buffer[0];",
    ),
    "a write to constant memory": (
        "return *(const constant Parameters*)words;",
        "return ((const constant Parameters*)words)[0] = {};",
    ),
    "a member that no parameter struct has": ("decode.window", "decode.windows"),
    "too much threadgroup memory": (
        "threadgroup float scratch[",
        "threadgroup float scratch[9000 + ",
    ),
    "an unknown function": ("simd_any(grows)", "simd_ballot_any(grows)"),
    "a float cut to an int unasked": ("int count = 0;", "int count = 0.5f;"),
    "a matrix of another size": (
        "simdgroup_matrix<half, 8, 8> left, right;",
        "simdgroup_matrix<half, 16, 8> left, right;",
    ),
    "a product of matrices of floats": (
        "simdgroup_matrix<half, 8, 8> left, right;",
        "simdgroup_matrix<float, 8, 8> left, right;",
    ),
    "the C++ library": ("return sum > 0.0f", "return std::isfinite(sum)"),
}


def test_the_program_that_errors_are_planted_in_is_right():
    assert [compile_errors(for_clang(program)) for program in programs()] == [""] * 5


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name):
    right, wrong = PLANTED[name]
    program = next(program for program in programs() if right in program)
    assert "error" in compile_errors(for_clang(program.replace(right, wrong, 1)))


def test_every_pointer_cast_names_an_address_space():
    """Clang lets an explicit cast lose its address space; Metal does not."""
    text = "".join(file.read_text() for file in FILES)
    names = "u?char|u?short|u?int|half|float|T|Parameters"
    pointers = re.findall(rf"\(([^()]*?\b(?:{names})\d?\*)\)", text)
    assert pointers
    for pointer in pointers:
        assert re.search(r"\b(device|threadgroup|constant|thread)\b", pointer), pointer


def test_the_files_are_ascii_without_double_literals():
    for file in FILES:
        text = file.read_text(encoding="ascii")
        code = "\n".join(line.split("//")[0] for line in text.splitlines())
        assert not re.findall(r"\b\d+\.\d*(?:e-?\d+)?(?![\dfe.])", code), file
