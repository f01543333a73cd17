"""TurboQuant pages behind the attention boundary: what every path shares.

`TurboQuantAttention` holds the page layout and the codecs with the layer's calibrated constants.
`reference.TurboQuantReference` stores and attends on MLX operations, `fused.TurboQuantFused` on the
kernels.

A prefill chunk attends over its own exact keys and values and over its compressed context; a
decode step reads everything compressed. That keeps a prompt that fits in one chunk free of loss,
but makes the low bits of a result depend on how the prompt was cut into chunks, on prefix-cache
hits and on preemption. With `reproducible`, a chunk reads its own keys and values through the
quantiser too, and the result depends, up to rounding, on nothing but the tokens.
"""

import mlx.core as mx

from vllm_metal.attention.backend import LayerShape
from vllm_metal.metal_kernel_backend.causal_attention import ChunkAttention
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


class TurboQuantAttention(ChunkAttention):
    """Compressed paged attention of one layer.

    Args:
        shape: heads and head sizes of the layer.
        block_size: tokens of a block, a multiple of 8.
        formats: key and value format.
        constants: the layer's calibrated centre and multiplier.
        reproducible: read a chunk's own keys and values compressed, too.
        page_bytes: bytes of a page where it is longer than its slots.

    Raises:
        ValueError: the head size has no rotation, or the block size is not a multiple of 8.
    """

    page_dtype = mx.uint16

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        formats: FormatPair,
        constants: KeyConstants,
        reproducible: bool = False,
        page_bytes: int = 0,
    ):
        super().__init__(shape, block_size)
        self.formats = formats
        self.format_names = formats.key.name, formats.value.name
        self.reproducible = reproducible
        self.layout = PageLayout(
            *formats, shape.head_size, shape.head_size_v, shape.num_kv_heads, block_size, page_bytes
        )
        self.key_codec = KeyCodec(formats.key, constants.centre, constants.multiplier)
        self.value_codec = ValueCodec(formats.value, shape.head_size_v)
        self.name = f"turboquant {formats}"

    @property
    def slot_size(self) -> int:
        return self.layout.slot_size

    @property
    def page_size_bytes(self) -> int:
        return self.layout.page_size_bytes
