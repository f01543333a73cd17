"""Launchers of the kernels in `kernels/turboquant.metal`: grids, templates, shapes.

Letters: T new tokens, B requests, Q query tokens of a request, Hq query heads, H KV heads,
G = Hq / H, N blocks of a request, D head size.

The order of a write and the reads after it: `store` writes through its input `pages` and returns
a token, a small array. Every reader takes the token and binds it, so that the GPU runs the reader
after the writer. A block is written again only after the step that read it has finished; nothing
else guards that.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE, Run, Target
from vllm_metal.metal_kernel_backend.turboquant.kernels import (
    DECODE,
    DEQUANTIZE,
    MERGE,
    STORE,
    codebook,
)
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.splits import (
    core_count,
    resident_groups,
    rows_per_simdgroup,
    splits,
)

DECODE_SIMDGROUPS = 4
MERGE_SIMDGROUPS = 8
STORE_SIMDGROUPS = 4
MAX_QUERY_TOKENS = 8


@dataclass(frozen=True)
class LayerConstants:
    """What the kernels are told of one layer, beside its layout. All float32."""

    centre: mx.array
    """[H, Dk], `KeyCodec.centre`."""
    key_factors: mx.array
    """[H, Dk], `KeyCodec.key_factors`."""
    query_factors: mx.array
    """[H, Dk], `KeyCodec.query_factors`."""
    value_factors: mx.array
    """[Dv], `ValueCodec.factors`."""


@dataclass
class Launcher:
    """The kernels of one layout on one target. Layers of equal layout may share it."""

    layout: PageLayout
    target: Target
    num_cores: int = 0
    """Cores of the GPU; 0 asks the device."""
    max_rows: int = 0
    """Query rows that a simdgroup serves at most, 1 to 8; 0 chooses by device. Each takes 16
    registers of 32 bits for its output: Apple GPUs before M3 have 128 in all."""
    run_tokens: int = 0
    """Neighbouring tokens that a lane reads at a time, 2 or 4; 0 chooses by device: 4 hides more
    latency, 2 needs fewer registers."""
    _kernels: dict[str, Run] = field(default_factory=dict, repr=False)
    _decode_kernels: dict[int, Run] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        layout = self.layout
        self.num_cores = self.num_cores or core_count(self.target)
        self.max_rows = self.max_rows or rows_per_simdgroup(self.target)
        self.run_tokens = self.run_tokens or (2 if self.target.name == "metal" else 4)
        largest = max(layout.key_head_size, layout.value_head_size)
        self.max_rows = max(1, min(self.max_rows, 2048 // largest))
        self._template = layout.template()
        self.key_codebook = codebook(layout.key_format, layout.key_head_size)
        self.value_codebook = codebook(layout.value_format, layout.value_head_size)
        for kernel in (STORE, MERGE, DEQUANTIZE):
            self._kernels[kernel.name] = self.target.build(kernel)

    def no_token(self) -> mx.array:
        """A token for pages to which nothing has been stored yet."""
        return _integers((0,) * 8, mx.uint32)

    def store(
        self,
        pages: mx.array,  # uint16 layout.pages_shape
        keys: mx.array,  # [T, H, Dk] float16, bfloat16 or float32
        values: mx.array,  # [T, H, Dv], as keys
        slot_mapping: mx.array,  # [T] int32, block * block_size + offset; below 0: skipped
        constants: LayerConstants,
        token: mx.array | None = None,
    ) -> mx.array:  # uint32 [8], the token that readers take
        """Writes T tokens into the pages, in place, in one dispatch.

        `token` orders this store after an earlier one to the same pages.
        """
        tokens, heads, _ = keys.shape
        groups = -(-max(2 * tokens * heads, 8) // STORE_SIMDGROUPS)
        return self._kernels[STORE.name](
            inputs=[
                pages,
                keys,
                values,
                slot_mapping,
                constants.centre,
                constants.key_factors,
                constants.value_factors,
                self.key_codebook,
                self.value_codebook,
                _integers((tokens,) + (0,) * 7),
                self.no_token() if token is None else token,
            ],
            template=[*self._template, ("SIMDGROUPS", STORE_SIMDGROUPS)],
            grid=(groups * STORE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            threadgroup=(STORE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.uint32],
        )[0]

    def decode(
        self,
        pages: mx.array,  # uint16 layout.pages_shape
        queries: mx.array,  # [B, Q, Hq, Dk], Q in 1..8: the last Q tokens of each request
        block_table: mx.array,  # [B, N] int32
        seq_lens: mx.array,  # [B] int32, the Q tokens included; 0 gives zeros
        constants: LayerConstants,
        scale: float,
        max_seq_len: int,
        token: mx.array,  # uint32 [8], from the last store
        sinks: mx.array | None = None,  # [Hq] float32: logits without a value
        window: int = 0,  # tokens that a query sees, itself included; 0: all
        softcap: float = 0.0,  # scores become softcap * tanh(score / softcap); 0: unchanged
    ) -> mx.array:  # [B, Q, Hq, Dv], as queries
        """Attention of Q query tokens per request over its pages, each seeing those before it.

        Raises ValueError if Q is over 8.
        """
        batch, num_queries, heads, _ = queries.shape
        if not 1 <= num_queries <= MAX_QUERY_TOKENS:
            raise ValueError(f"{num_queries} query tokens per request; 1 to {MAX_QUERY_TOKENS}")
        group = heads // self.layout.num_kv_heads
        rows = group * num_queries
        tiles = -(-rows // self.max_rows)
        rows_each = -(-rows // tiles)
        visible = min(max_seq_len, window + num_queries + 8) if window else max_seq_len
        groups = batch * self.layout.num_kv_heads * tiles
        slots = self.num_cores * resident_groups(rows_each)
        split_tokens, num_splits = splits(visible, groups, slots)
        params = _integers((split_tokens, num_splits, window, block_table.shape[1], 0, 0, 0, 0))
        scales = _floats((scale, softcap) + (0.0,) * 6)
        template = [*self._template, ("G", group), ("Q", num_queries)]
        partials, states = self._decode_kernel(rows_each)(
            inputs=[
                pages,
                queries,
                constants.query_factors,
                constants.centre,
                block_table,
                seq_lens,
                self.key_codebook,
                self.value_codebook,
                params,
                scales,
                token,
            ],
            template=[
                *template,
                ("R", rows_each),
                ("TOKENS", self.run_tokens),
                ("SIMDGROUPS", DECODE_SIMDGROUPS),
                ("SOFTCAP", int(softcap > 0)),
            ],
            grid=(
                self.layout.num_kv_heads * tiles * DECODE_SIMDGROUPS * SIMD_SIZE,
                num_splits,
                batch,
            ),
            threadgroup=(DECODE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[
                (batch, num_splits, num_queries * heads, self.layout.value_head_size),
                (batch, num_splits, num_queries * heads, 2),
            ],
            output_dtypes=[mx.float32, mx.float32],
        )
        no_sinks = _floats((0.0,) * 8)
        return self._kernels[MERGE.name](
            inputs=[
                partials,
                states,
                queries,
                constants.centre,
                constants.value_factors,
                seq_lens,
                no_sinks if sinks is None else sinks.astype(mx.float32),
                params,
                scales,
            ],
            template=[
                *template,
                ("SIMDGROUPS", MERGE_SIMDGROUPS),
                ("SINKS", int(sinks is not None)),
            ],
            grid=(num_queries * heads * MERGE_SIMDGROUPS * SIMD_SIZE, batch, 1),
            threadgroup=(MERGE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[(batch, num_queries, heads, self.layout.value_head_size)],
            output_dtypes=[queries.dtype],
        )[0]

    def dequantize(
        self,
        pages: mx.array,  # uint16 layout.pages_shape
        block_table: mx.array,  # [N] int32, one request
        constants: LayerConstants,
        first: int,  # even
        count: int,
        token: mx.array,  # uint32 [8], from the last store
        dtype: mx.Dtype,
        heads: slice = slice(None),  # of the H KV heads, without a step
    ) -> tuple[mx.array, mx.array]:  # [heads, count, Dk], [heads, count, Dv]
        """Tokens first .. first + count - 1 of a request, as the model had them.

        Raises ValueError if `first` is odd.
        """
        if first % 2:
            raise ValueError(f"first token {first} is odd")
        layout = self.layout
        first_head, end_head, _ = heads.indices(layout.num_kv_heads)
        num_heads = end_head - first_head
        pairs = -(-count // 2)
        groups = -(-2 * pairs // STORE_SIMDGROUPS)
        keys, values = self._kernels[DEQUANTIZE.name](
            inputs=[
                pages,
                block_table,
                constants.centre,
                constants.query_factors,
                constants.value_factors,
                self.key_codebook,
                self.value_codebook,
                _integers((first, count, first_head, 0, 0, 0, 0, 0)),
                token,
            ],
            template=[*self._template, ("SIMDGROUPS", STORE_SIMDGROUPS)],
            grid=(groups * STORE_SIMDGROUPS * SIMD_SIZE, num_heads, 1),
            threadgroup=(STORE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[
                (num_heads, count, layout.key_head_size),
                (num_heads, count, layout.value_head_size),
            ],
            output_dtypes=[dtype, dtype],
        )
        return keys, values

    def _decode_kernel(self, rows: int) -> Run:
        """The kernel for `rows` query rows per simdgroup; more rows, fewer groups on a core."""
        resident = resident_groups(rows)
        if resident not in self._decode_kernels:
            threads = DECODE_SIMDGROUPS * SIMD_SIZE
            self._decode_kernels[resident] = self.target.build(DECODE, (threads, resident))
        return self._decode_kernels[resident]


@lru_cache(maxsize=256)
def _integers(numbers: tuple[int, ...], dtype: mx.Dtype = mx.int32) -> mx.array:
    return mx.array(numbers, dtype)


@lru_cache(maxsize=256)
def _floats(numbers: tuple[float, ...]) -> mx.array:
    return mx.array(numbers, mx.float32)
