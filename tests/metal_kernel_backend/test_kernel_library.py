"""The text of kernels on its way to a target."""

from dataclasses import replace

import mlx.core as mx
import pytest

from vllm_metal.metal_kernel_backend import kernel_library
from vllm_metal.metal_kernel_backend.kernel_library import (
    CudaTarget,
    Kernel,
    available_target,
    compact,
    declare_threadgroup,
    library_source,
    library_text,
    without_device,
)

KERNEL = Kernel("scale", "turboquant", ("rotation",), ("x",), ("y",), "  y[0] = x[0];\n")


def test_no_target_is_chosen_on_a_cpu():
    if mx.default_device() == mx.Device(mx.cpu):
        assert available_target() is None


def test_the_kernel_library_is_found():
    assert "store_vectors" in library_source("turboquant")


def test_a_kernel_takes_the_start_of_the_file_and_its_sections():
    text = library_text(KERNEL)
    assert "SIMD_SIZE = 32" in text and "struct Vector" in text and "store_vectors" not in text
    with pytest.raises(KeyError, match="no such"):
        library_text(replace(KERNEL, sections=("no such",)))


def test_compact_text_keeps_the_program_and_loses_the_comments():
    text = compact(library_source("turboquant"))
    assert "//" not in text and "\n\n" not in text and "\n " not in text
    assert text.count("{") == library_source("turboquant").count("{")


def test_cuda_text_keeps_words_that_contain_device():
    assert without_device("const device int* x; __device__ f(); on_device (y)") == (
        "const int* x; __device__ f(); on_device (y)"
    )


def test_threadgroup_arrays_are_declared_where_a_line_begins():
    body = "  threadgroup float x[4];\n  f((threadgroup float*)x);\n"
    assert declare_threadgroup(body, "__shared__") == (
        "  __shared__ float x[4];\n  f((threadgroup float*)x);\n"
    )


def test_cuda_names_change_with_anything_that_is_compiled(monkeypatch):
    """MLX finds compiled CUDA kernels by name, also in a later process."""
    names = []
    monkeypatch.setattr(kernel_library.mx.fast, "cuda_kernel", lambda name, **_: names.append(name))
    CudaTarget().build(KERNEL)
    CudaTarget().build(KERNEL, (128, 3))
    CudaTarget().build(replace(KERNEL, body="  y[0] = -x[0];\n"))
    assert len(set(names)) == 3
