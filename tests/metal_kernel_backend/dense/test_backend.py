"""Names and bytes of dense pages, whoever stores them."""

import mlx.core as mx
import pytest

from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.host_target import HostTarget

SHAPE = LayerShape(num_kv_heads=2, head_size=8, head_size_v=4)
DTYPES = [(mx.float32, "float32", 48), (mx.float16, "float16", 24), (mx.bfloat16, "bfloat16", 24)]


@pytest.mark.parametrize(("dtype", "name", "slot_size"), DTYPES, ids=str)
def test_name_and_bytes(dtype, name, slot_size):
    operations, kernels = DensePages(SHAPE, 8, dtype), DenseFused(SHAPE, 8, dtype, HostTarget())
    assert operations.name == f"dense {name}"
    assert kernels.name == f"dense {name} (host kernels)"
    for backend in (operations, kernels):
        assert backend.page_dtype == dtype and not backend.compressed
        assert backend.slot_size == slot_size
        assert backend.page_size_bytes == 8 * 2 * slot_size
    assert DenseFused(SHAPE, 8, dtype, HostTarget(), 4096).page_size_bytes == 4096
