"""Where keys and values are in a dense page.

A page is the keys `[H, block_size, Dk]` of a block and then its values `[H, block_size, Dv]`, and
unused bytes where blocks are padded to a size that other layers share. Head-major blocks make one
head's block a contiguous run, so that a run of tokens is a run of bytes.
"""

from dataclasses import dataclass
from math import gcd

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.kernel_library import Template

MAX_DECODED_HEAD_SIZE = 512
"""Elements of the longest key or value that the decode kernel takes: 32 lanes hold 16 each."""


def dense_slot_size(shape: LayerShape, dtype: mx.Dtype) -> int:
    """Bytes of one KV head of one token in dense pages, keys and values together."""
    return (shape.head_size + shape.head_size_v) * dtype.size


@dataclass(frozen=True)
class DenseLayout:
    """The pages of one layer, as its kernels are told of them."""

    dtype: mx.Dtype
    key_head_size: int
    value_head_size: int
    num_kv_heads: int
    block_size: int
    """Tokens in a block, a multiple of 8."""
    page_size_bytes: int
    """From one block to the next."""

    @property
    def lane_elements(self) -> int:
        """Elements of a key or value that a lane of the decode kernel holds: 16 bytes of 16-bit
        elements, or twice as many where 32 lanes would not hold a vector."""
        largest = max(self.key_head_size, self.value_head_size)
        return 8 if largest <= MAX_DECODED_HEAD_SIZE // 2 else 16

    @property
    def vector_bytes(self) -> int:
        """Bytes of the widest load with which keys and values are read, up to 16: every vector
        begins on a multiple of it, and is one."""
        key, value = (size * self.dtype.size for size in (self.key_head_size, self.value_head_size))
        return gcd(16, key, value, self.page_size_bytes)

    def pages_shape(self, num_blocks: int) -> tuple[int, int]:
        """Shape of the array of pages, in elements of `dtype`."""
        return num_blocks, self.page_size_bytes // self.dtype.size

    def template(self) -> Template:
        """What a kernel is compiled for, in the order of `DenseLayout` in `dense/layout.h`."""
        return [
            ("ELEMENT", self.dtype),
            ("NUM_KV_HEADS", self.num_kv_heads),
            ("BLOCK_SIZE", self.block_size),
            ("KEY_HEAD_SIZE", self.key_head_size),
            ("VALUE_HEAD_SIZE", self.value_head_size),
            ("PAGE_ELEMENTS", self.page_size_bytes // self.dtype.size),
            ("VECTOR_BYTES", self.vector_bytes),
            ("LANE_ELEMENTS", self.lane_elements),
        ]
