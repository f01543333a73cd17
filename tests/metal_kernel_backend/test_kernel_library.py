"""The text of kernels on its way to a target."""

import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.metal_kernel_backend import kernel_library
from vllm_metal.metal_kernel_backend.kernel_library import (
    KERNELS,
    CudaTarget,
    Kernel,
    MetalTarget,
    available_target,
    compact,
    declare_threadgroup,
    expanded,
    header_source,
    library_text,
    without_device,
)

CONSTANTS = (
    ("paged/constants.h", "#pragma once\nconstant constexpr int SIMD_SIZE = 32;\n"),
    ("turboquant/constants.h", "#pragma once\n"),
)

KERNEL = Kernel(
    "scale", "turboquant/rotation.h", CONSTANTS, ("x", "factor"), ("y",), "  y[0] = x[0];\n"
)


def test_no_target_is_chosen_on_a_cpu():
    if mx.default_device() == mx.Device(mx.cpu):
        assert available_target() is None


def test_a_kernel_takes_its_header_and_what_that_includes():
    text = library_text(KERNEL)
    assert text.count("SIMD_SIZE = 32") == text.count("struct Vector") == 1
    assert "store_vectors" not in text and '#include "' not in text and "#pragma once" not in text
    with pytest.raises(FileNotFoundError, match="none.h"):
        library_text(replace(KERNEL, header="turboquant/none.h"))


def test_a_kernel_without_a_header_has_no_library():
    assert library_text(replace(KERNEL, header="")) == ""


def test_what_two_headers_include_is_expanded_once_and_before_both(monkeypatch):
    files = {
        "a.h": '#pragma once\n#include "b.h"\n#include "c.h"\nint a;\n',
        "b.h": '#include "c.h"\nint b;\n',
        "c.h": '#include "x/constants.h"\nint c;\n',
    }
    monkeypatch.setattr(kernel_library, "header_source", files.__getitem__)
    assert (
        expanded("a.h", {"x/constants.h": "#pragma once\nint d;\n"})
        == "int d;\nint c;\nint b;\nint a;\n"
    )


def test_inputs_are_ordered_by_name():
    assert KERNEL.in_order({"factor": 2, "x": 1}) == [1, 2]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": 1}, r"kernel scale: inputs missing: \['factor'\], superfluous: \[\]"),
        ({"x": 1, "factor": 2, "z": 3}, r"missing: \[\], superfluous: \['z'\]"),
    ],
)
def test_inputs_that_are_missing_or_superfluous_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        KERNEL.in_order(inputs)


def test_compact_text_keeps_the_program_and_loses_the_comments():
    source = header_source("turboquant/rotation.h")
    text = compact(source)
    assert "//" not in text and "\n\n" not in text and "\n " not in text
    assert text.count("{") == source.count("{")


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


@pytest.mark.parametrize(
    ("target", "maker"), [(MetalTarget, "metal_kernel"), (CudaTarget, "cuda_kernel")]
)
def test_mlx_is_given_the_first_row_of_a_large_input(monkeypatch, target, maker):
    """It lies where the input does; MLX counts the elements of what a launch binds."""
    bound = []

    def record(**_):
        return lambda inputs, grid: bound.extend(inputs)

    monkeypatch.setattr(kernel_library.mx.fast, maker, record)
    pages, factor = mx.zeros((1000, 64), mx.uint16), mx.ones((8,))
    target().build(replace(KERNEL, large_inputs=("x",)))(inputs=[pages, factor], grid=(1, 1, 1))
    row, same = bound
    assert row.shape == (1, 64) and same is factor
    mx.eval(pages, row)
    starts = [np.array(array, copy=False).ctypes.data for array in (pages, row)]
    assert starts[0] == starts[1]


ROOT = Path(__file__).parents[2]


def packaged_kernels(wheel: str) -> set[str]:
    """Paths of the files in the package's `kernels` folder."""
    prefix = "vllm_metal/kernels/"
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix(prefix) for name in archive.namelist() if name.startswith(prefix)}


@pytest.mark.nightly
def test_a_wheel_and_one_made_of_the_sdist_hold_every_kernel_file(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is in the extra: test")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    files = {str(file.relative_to(KERNELS)) for file in KERNELS.rglob("*") if file.is_file()}
    assert "turboquant.metal" in files and "paged/decode.h" in files and "dense/store.h" in files
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    assert packaged_kernels(wheel) == files
    [sdist] = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    [unpacked] = (tmp_path / "sdist").iterdir()
    [wheel] = WheelBuilder(str(unpacked)).build(directory=str(tmp_path / "second"))
    assert packaged_kernels(wheel) == files
