"""Two requests through the kernels, beside what the codec makes of the same keys and values."""

import mlx.core as mx
import numpy as np

from vllm_metal.attention.slots import compose_slots, split_slots
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, TokenCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.slots import Slots

GROUP = 4
"""Query heads of a KV head."""


class Trial:
    """Two requests of random keys and values, stored through the kernel."""

    def __init__(self, launcher: Launcher, length: int, dtype: mx.Dtype = mx.float16):
        """`dtype` is that of queries, keys and values."""
        layout = launcher.layout
        self.launcher, self.length, self.dtype = launcher, length, dtype
        rng = np.random.default_rng(length)
        heads, size = layout.num_kv_heads, layout.key_head_size
        centre = rng.standard_normal((heads, size)).astype(np.float32)
        with mx.stream(mx.cpu):
            self.key_codec = KeyCodec(layout.key_format, centre, np.ones_like(centre))
            self.value_codec = ValueCodec(layout.value_format, size)
            shape = 2 * length, heads, size
            self.keys = mx.array(rng.standard_normal(shape) + centre).astype(dtype)
            self.values = mx.array(rng.standard_normal(shape)).astype(dtype)
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
        blocks = -(-length // layout.block_size)
        self.table = 1 + rng.permutation(2 * blocks).reshape(2, blocks)
        self.pages = mx.zeros(layout.pages_shape(2 * blocks + 1), mx.uint16)
        shape = 2, 1, heads * GROUP, size
        self.queries = mx.array(rng.standard_normal(shape)).astype(dtype)
        self.sinks = mx.array(rng.standard_normal(heads * GROUP).astype(np.float32))
        mx.eval(self.pages, self.keys, self.values, self.queries)

    def store(self) -> mx.array:
        arguments = self.keys, self.values, self._slots(), self.constants
        return self.launcher.store(self.pages, *arguments)

    def decode(self, token: mx.array, **settings) -> mx.array:  # [2, 1, Hq, D]
        """`settings` are `sinks` and `window` of the launcher."""
        return self.launcher.decode(
            self.pages,
            self.queries,
            mx.array(self.table.astype(np.int32)),
            mx.array([self.length] * 2),
            self.constants,
            self.queries.shape[-1] ** -0.5,
            self.length,
            token,
            **settings,
        )

    def dequantize(self, token: mx.array) -> tuple[mx.array, mx.array]:  # [H, length, D] each
        """The last request."""
        table = mx.array(self.table[-1].astype(np.int32))
        arguments = self.constants, 0, self.length, token, self.dtype
        return self.launcher.dequantize(self.pages, table, *arguments)

    def wrong_bytes(self) -> int:
        """Stored bytes of codes, levels, scales and biases that are not the codec's."""
        slots, size = Slots(self.launcher.layout), self.launcher.layout.block_size
        with mx.stream(mx.cpu):
            tokens = TokenCodec(self.key_codec, self.value_codec).quantize(self.keys, self.values)
            expected = np.array(slots.pack(tokens))
            indices = slots.indices(*split_slots(self._slots(), size))
            blocks, columns = (np.array(index) for index in indices)
        stored = np.array(self.pages)[blocks, columns]
        return int((stored.view(np.uint8) != expected.view(np.uint8)).sum())

    def _slots(self) -> mx.array:
        """Where the tokens of both requests go, int32 [2 * length]."""
        positions = np.tile(np.arange(self.length), (2, 1))
        slots = compose_slots(self.table, positions, self.launcher.layout.block_size)
        return mx.array(slots.reshape(-1))

    def plain(self) -> list[mx.array]:  # [2, H, length, D] each, float32
        """What the codec makes of the keys and values."""
        with mx.stream(mx.cpu):
            keys = self.key_codec.dequantize(self.key_codec.quantize(self.keys))
            values = self.value_codec.dequantize(self.value_codec.quantize(self.values))
            split = 2, self.length, *keys.shape[1:]
            return [x.reshape(split).swapaxes(1, 2) for x in (keys, values)]

    def expected(self, sinks: mx.array | None = None, window: int = 0) -> np.ndarray:
        """Float32 attention over them, [2, 1, Hq, D]."""
        with mx.stream(mx.cpu):
            queries = self.queries.astype(mx.float32).swapaxes(1, 2)
            seen = mx.arange(self.length) >= (self.length - window if window else 0)
            out = mx.fast.scaled_dot_product_attention(
                queries,
                *self.plain(),
                scale=queries.shape[-1] ** -0.5,
                mask=seen[None],
                sinks=sinks,
            )
            return np.array(out.swapaxes(1, 2))
