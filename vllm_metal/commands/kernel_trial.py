"""Two requests of random keys and values, stored and attended to, beside the right answers.

`KernelTrial` runs the kernels of a format pair, `DenseTrial` dense pages. The answers are
computed on the CPU in float32: from what the codec makes of the keys and values, or from the keys
and values themselves.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, LayerShape, Pages, Rows
from vllm_metal.attention.metadata import DecodeMetadata
from vllm_metal.attention.slots import compose_slots, split_slots
from vllm_metal.metal_kernel_backend.dense.fused import DenseFused
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.kernel_library import Target
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, TokenCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.slots import Slots

QUERY_HEADS_PER_KV_HEAD = 4
REQUESTS = 2


class Trial:
    """Keys, values and queries of two requests, and where their tokens are stored.

    Args:
        shape: heads and head sizes of the layer; keys and values of one size.
        block_size: tokens of a block.
        length: tokens of each request.
        dtype: of queries, keys and values.
    """

    def __init__(self, shape: LayerShape, block_size: int, length: int, dtype: mx.Dtype):
        self.shape, self.block_size, self.length, self.dtype = shape, block_size, length, dtype
        rng = np.random.default_rng(length)
        heads, size = shape.num_kv_heads, shape.head_size
        self.centre = rng.standard_normal((heads, size)).astype(np.float32)
        with mx.stream(mx.cpu):
            tokens = REQUESTS * length, heads, size
            self.keys = mx.array(rng.standard_normal(tokens) + self.centre).astype(dtype)
            self.values = mx.array(rng.standard_normal(tokens)).astype(dtype)
        blocks = -(-length // block_size)
        self.num_blocks = REQUESTS * blocks + 1
        self.table = 1 + rng.permutation(REQUESTS * blocks).reshape(REQUESTS, blocks)
        num_queries = heads * QUERY_HEADS_PER_KV_HEAD
        self.queries = mx.array(rng.standard_normal((REQUESTS, num_queries, size))).astype(dtype)
        self.sinks = mx.array(rng.standard_normal(num_queries).astype(np.float32))
        mx.eval(self.keys, self.values, self.queries)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.shape.head_size**-0.5

    def block_table(self) -> mx.array:  # [2, N] int32
        return mx.array(self.table.astype(np.int32))

    def slot_mapping(self) -> mx.array:  # [2 * length] int32
        """Where the tokens of both requests go."""
        positions = np.tile(np.arange(self.length), (REQUESTS, 1))
        return mx.array(compose_slots(self.table, positions, self.block_size).reshape(-1))

    def plain(self) -> list[mx.array]:  # [2, H, length, D] each, float32
        """The keys and values that attention should see."""
        with mx.stream(mx.cpu):
            return [self._by_request(x.astype(mx.float32)) for x in (self.keys, self.values)]

    def expected(self, sinks: mx.array | None = None, window: int = 0) -> np.ndarray:
        """Float32 attention of both queries over `plain`, [2, Hq, D]."""
        with mx.stream(mx.cpu):
            seen = mx.arange(self.length) >= (self.length - window if window else 0)
            out = mx.fast.scaled_dot_product_attention(
                self.queries.astype(mx.float32)[:, :, None],
                *self.plain(),
                scale=self.scale,
                mask=seen[None],
                sinks=sinks,
            )
            return np.array(out[:, :, 0])

    def break_last_key(self) -> None:
        """Makes one element NaN in the first KV head of the last token of the last request."""
        with mx.stream(mx.cpu):
            keys = np.array(self.keys.astype(mx.float32))
            keys[-1, 0, 0] = np.nan
            self.keys = mx.array(keys).astype(self.dtype)

    def _by_request(self, tokens: mx.array) -> mx.array:
        return tokens.reshape(REQUESTS, self.length, *tokens.shape[1:]).swapaxes(1, 2)


class KernelTrial(Trial):
    """The same through the kernels of one pair of formats."""

    def __init__(self, launcher: Launcher, length: int, dtype: mx.Dtype = mx.float16):
        layout: PageLayout = launcher.layout
        shape = LayerShape(layout.num_kv_heads, layout.key_head_size, layout.value_head_size)
        super().__init__(shape, layout.block_size, length, dtype)
        self.launcher = launcher
        with mx.stream(mx.cpu):
            ones = np.ones_like(self.centre)
            self.key_codec = KeyCodec(layout.key_format, self.centre, ones)
            self.value_codec = ValueCodec(layout.value_format, shape.head_size_v)
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
        self.pages = mx.zeros(layout.pages_shape(self.num_blocks), mx.uint16)
        mx.eval(self.pages)
        self._plain: list[mx.array] | None = None

    def break_last_key(self) -> None:
        super().break_last_key()
        self._plain = None

    def store(self) -> mx.array:
        """The token of a store of all keys and values."""
        arguments = self.keys, self.values, self.slot_mapping(), self.constants
        return self.launcher.store(self.pages, *arguments)

    def decode(self, token: mx.array, **settings) -> mx.array:  # [2, Hq, D]
        """`settings` are `sinks` and `window` of the launcher."""
        return self.launcher.decode(
            self.pages,
            self.queries[:, None],
            self.block_table(),
            mx.array([self.length] * REQUESTS),
            self.constants,
            self.scale,
            self.length,
            token,
            **settings,
        )[:, 0]

    def dequantize(self, token: mx.array) -> tuple[mx.array, mx.array]:  # [H, length, D] each
        """Keys and values of the last request."""
        table, arguments = self.block_table()[-1], (0, self.length, token, self.dtype)
        return self.launcher.read(self.pages, table, self.constants, *arguments)

    def wrong_bytes(self, token: mx.array) -> int:
        """Stored bytes of codes, levels, scales and biases that are not the codec's.

        The pages are read once the store behind `token` has run: in MLX's graph the array of pages
        depends on no store, so reading it alone waits for none.
        """
        slots = Slots(self.launcher.layout)
        with mx.stream(mx.cpu):
            tokens = TokenCodec(self.key_codec, self.value_codec).quantize(self.keys, self.values)
            expected = np.array(slots.pack(tokens))
            indices = slots.indices(*split_slots(self.slot_mapping(), self.block_size))
            blocks, columns = (np.array(index) for index in indices)
        mx.eval(token)
        stored = np.array(self.pages)[blocks, columns]
        return int((stored.view(np.uint8) != expected.view(np.uint8)).sum())

    def plain(self) -> list[mx.array]:
        """What the codec makes of the keys and values: computed once, it takes most of the time of
        a trial."""
        if self._plain is None:
            with mx.stream(mx.cpu):
                keys = self.key_codec.dequantize(self.key_codec.quantize(self.keys))
                values = self.value_codec.dequantize(self.value_codec.quantize(self.values))
                self._plain = [self._by_request(x) for x in (keys, values)]
                mx.eval(self._plain)
        return self._plain


class DenseTrial(Trial):
    """The same through dense pages of the type of the keys and values.

    Args:
        target: of the kernels; None for MLX operations.
    """

    def __init__(
        self,
        shape: LayerShape,
        block_size: int,
        length: int,
        dtype: mx.Dtype,
        target: Target | None = None,
    ):
        super().__init__(shape, block_size, length, dtype)
        self.target = target

    def decode(self, sinks: mx.array | None = None, window: int = 0) -> mx.array:  # [2, Hq, D]
        backend = dense_backend(
            replace(self.shape, sliding_window=window or None),
            self.block_size,
            self.dtype,
            self.target,
        )
        pages, metadata = self._stored(backend), self._metadata()
        sinks = None if sinks is None else sinks.astype(self.dtype)
        return backend.decode(pages, Rows(self.queries, metadata, self.scale, sinks))

    def read(self) -> list[mx.array]:  # [2, H, length, D] each
        """Keys and values of both requests, as a chunk with a context reads them."""
        backend = dense_backend(self.shape, self.block_size, self.dtype, self.target)
        read = backend.read(self._stored(backend), self._metadata())
        return [part[:, :, : self.length] for part in read]

    def wrong_bytes(self) -> int:
        """Bytes of the pages that are not those that MLX operations store."""
        stored = []
        for target in (None, self.target):
            backend = dense_backend(self.shape, self.block_size, self.dtype, target)
            pages = self._stored(backend)
            mx.eval([array for array in pages if array is not None])
            stored.append(np.array(pages.array.view(mx.uint8)))
        return int((stored[0] != stored[1]).sum())

    def _stored(self, backend: AttentionBackend) -> Pages:
        page = backend.page_size_bytes // self.dtype.size
        array = mx.zeros((self.num_blocks, page), self.dtype)
        mx.eval(array)
        pages = Pages(array, backend.first_token())
        return backend.store(pages, self.keys, self.values, self._metadata())

    def _metadata(self) -> DecodeMetadata:
        lengths = [self.length] * REQUESTS
        return DecodeMetadata(
            block_table=self.block_table(),
            seq_lens=mx.array(lengths),
            slot_mapping=self.slot_mapping(),
            offset=mx.array(lengths) - 1,
            max_seq_len=self.length,
        )


def dense_backend(
    shape: LayerShape, block_size: int, dtype: mx.Dtype, target: Target | None
) -> AttentionBackend:
    """Dense pages on the kernels of a target, or on MLX operations."""
    if target is None:
        return DensePages(shape, block_size, dtype)
    return DenseFused(shape, block_size, dtype, target)
