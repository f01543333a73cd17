"""The text that MLX writes around a kernel, word for word: shims and targets rely on it.

A new MLX that writes another needs a look at `kernel_library`, the shims and `metal_text` before
the bound on its version in pyproject.toml moves.
"""

import mlx.core as mx
import pytest

from tests.kernels.metal_text import PrintingTarget, metal_text
from vllm_metal.metal_kernel_backend.kernel_library import Kernel

KERNEL = Kernel(
    "scale",
    "",
    "",
    ("many", "few"),
    ("result",),
    "  uint i = threadgroup_position_in_grid.x * 32 + thread_index_in_simdgroup;\n"
    "  result[i] = T(many[i] * few[simdgroup_index_in_threadgroup] * N);",
)

METAL = """template <typename T, int N>
[[kernel]] void NAME(
  const device float* many [[buffer(0)]],
  const constant int32_t* few [[buffer(1)]],
  device bfloat16_t* result [[buffer(2)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
BODY
}

template [[host_name("NAME")]] [[kernel]] decltype(NAME<bfloat16_t, 3>) NAME<bfloat16_t, 3>;
"""
"""The types of inputs and outputs are in the name, and that `few` is in the constant address space:
so arrays of 8 and more elements and smaller ones give two kernels."""

CUDA = """namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void NAME(
    const float* many,
    const int32_t* few,
    __nv_bfloat16* result) {
  using T = __nv_bfloat16;
  constexpr int N = 3;

BODY
}

} // namespace mlx::core::cu
"""
"""Behind MLX's own includes and the kernel's header. The types of inputs and outputs are not in the
name, by which MLX finds compiled kernels: `CudaTarget` puts them there."""


def launch(run, many: mx.array, few: mx.array) -> mx.array:
    return run(
        inputs=[many, few],
        template=[("T", mx.bfloat16), ("N", 3)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[many.shape],
        output_dtypes=[mx.bfloat16],
    )[0]


def test_metal():
    run = PrintingTarget().build(KERNEL)
    [text] = metal_text(
        lambda many, few: launch(run, many, few), mx.zeros((8,)), mx.zeros((7,), mx.int32)
    )
    name = text.split('host_name("')[1].split('"')[0]
    assert name.startswith("custom_kernel_scale_")
    assert name.endswith("__bfloat16_t_3_float_int32_tc_bfloat16_t")
    assert text == METAL.replace("NAME", name).replace("BODY", KERNEL.body)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX has CUDA kernels only with CUDA")
def test_cuda(capfd):
    run = mx.fast.cuda_kernel("scale", ["many", "few"], ["result"], KERNEL.body, "// header\n")
    with mx.stream(mx.gpu):
        few = mx.zeros((7,), mx.int32)
        launch(lambda **arguments: run(verbose=True, **arguments), mx.zeros((8,)), few)
    text = capfd.readouterr().out.split("```\n")[1]
    written = CUDA.replace("NAME", "custom_kernel_scale_bfloat16_t_3").replace("BODY", KERNEL.body)
    assert text.endswith(f"// header\n{written}\n")
