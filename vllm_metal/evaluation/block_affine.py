"""The formats that other TurboQuant caches use, to compare ours with.

Keys: blocks of 32, affine, not rotated, float16 scale and rounded float16 zero point. Values:
rotated, Lloyd-Max codes of a Gaussian, one float16 RMS for each 32. What is stored is what the
model reads back; the pages hold the read-back numbers, so only the loss is measured, not the size.
"""

from itertools import product

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape, Pages
from vllm_metal.attention.metadata import AttentionMetadata
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.turboquant.formats import DEGREE, value_format
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs

GROUP = 32
KEY_BITS = range(2, 9)
VALUE_BITS = tuple(DEGREE)
GAUSSIAN = 1 << 12
"""A head size so large that the codebook is a Gaussian's."""


def parse_bits(text: str) -> tuple[int, int]:
    """`8/3` as the bits of keys and of values. Raises ValueError for anything else."""
    for bits in product(KEY_BITS, VALUE_BITS):
        if text == "{}/{}".format(*bits):
            return bits
    keys, values = (", ".join(map(str, bits)) for bits in (KEY_BITS, VALUE_BITS))
    raise ValueError(f"{text!r} is not KEYS/VALUES in bits; allowed: keys {keys}; values {values}")


class BlockAffine(DensePages):
    """Reads every key and value as the block formats would give it back.

    Raises UserError for a head size that blocks do not divide.
    """

    reproducible = True

    def __init__(self, shape: LayerShape, block_size: int, key_bits: int, value_bits: int):
        super().__init__(shape, block_size, mx.float32)
        for size in (shape.head_size, shape.head_size_v):
            if size % GROUP:
                raise UserError(f"Block-affine formats of head size {size}; {GROUP} must divide it")
        self.name = f"block-affine {key_bits} bit / Lloyd-Max {value_bits} bit"
        self.key_bits, self.value_bits = key_bits, value_bits
        format = value_format(f"q{value_bits}_0")
        self._centroids = mx.array(format.centroids(GAUSSIAN))
        self._midpoints = mx.array(format.midpoints(GAUSSIAN))
        self._signs = mx.array(signs(shape.head_size_v))

    @property
    def bits_per_element(self) -> float:
        """Stored bits: codes, a scale and a zero point of a key block, an RMS of a value block."""
        return (self.key_bits + 2 * 16 / GROUP + self.value_bits + 16 / GROUP) / 2

    def store(
        self, pages: Pages, keys: mx.array, values: mx.array, metadata: AttentionMetadata
    ) -> Pages:
        return super().store(pages, self.read_keys(keys), self.read_values(values), metadata)

    def read_keys(self, keys: mx.array) -> mx.array:
        """Keys [..., D] as stored and read back."""
        blocks = keys.reshape(*keys.shape[:-1], -1, GROUP)
        low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
        last = (1 << self.key_bits) - 1
        scale = mx.maximum(_half((high - low) / last), 1e-7)
        zero = _half(mx.round(low / scale))
        codes = mx.clip(mx.round(blocks / scale) - zero, 0, last)
        return ((codes + zero) * scale).reshape(keys.shape)

    def read_values(self, values: mx.array) -> mx.array:
        """Values [..., D] as stored and read back."""
        rotated = rotate(values.astype(mx.float32) * self._signs)
        blocks = rotated.reshape(*values.shape[:-1], -1, GROUP)
        scale = mx.maximum(_half(mx.sqrt(mx.mean(blocks * blocks, axis=-1, keepdims=True))), 1e-7)
        codes = mx.sum((blocks / scale)[..., None] >= self._midpoints, axis=-1)
        return rotate((self._centroids[codes] * scale).reshape(values.shape)) * self._signs


def _half(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(mx.float32)
