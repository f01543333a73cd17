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
import numpy as np

from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE, Kernel, Target
from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout

DECODE_SIMDGROUPS = 4
MERGE_SIMDGROUPS = 4
STORE_SIMDGROUPS = 4
MAX_QUERY_TOKENS = 8
CODEBOOK_FACTORS = 4
CODEBOOK_MIDPOINTS = 16

SLOTS = """
  using Slots = SlotLayout<
      NUM_KV_HEADS, BLOCK_SIZE, KEY_HEAD_SIZE, VALUE_HEAD_SIZE, KEY_BITS, VALUE_BITS, KEY_TERMS,
      VALUE_TERMS, KEY_HAS_BIAS, HEAD_PAGE_BYTES, VALUE_CODES_OFFSET, KEY_SCALES_OFFSET,
      KEY_BIASES_OFFSET, VALUE_SCALES_OFFSET>;
  constexpr int LONGER = KEY_HEAD_SIZE > VALUE_HEAD_SIZE ? KEY_HEAD_SIZE : VALUE_HEAD_SIZE;
"""

POSITION = """threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup"""

STORE = Kernel(
    "turboquant_store",
    "turboquant",
    ("pages", "keys", "values", "slot_mapping", "centre", "key_factors", "value_factors")
    + ("key_codebook", "value_codebook", "params", "after"),
    ("token",),
    SLOTS
    + f"""
  threadgroup uchar codes[SIMDGROUPS * LONGER];
  store_vectors<Slots, SIMDGROUPS>(
      pages, keys, values, slot_mapping, centre, key_factors, value_factors, key_codebook,
      value_codebook, params, token, codes, {POSITION});
""",
)

DECODE = Kernel(
    "turboquant_decode",
    "turboquant",
    ("pages", "queries", "query_factors", "centre", "block_table", "seq_lens")
    + ("key_codebook", "value_codebook", "params", "scales", "token"),
    ("partials", "states"),
    SLOTS
    + f"""
  using Attention = Decode<Slots, G, Q, R, SIMDGROUPS, SOFTCAP>;
  threadgroup uint4 query_words[Attention::QUERY_WORDS / 4];
  threadgroup float scratch[Attention::SCRATCH];
  Attention::run(
      pages, queries, query_factors, centre, block_table, seq_lens, key_codebook, value_codebook,
      params, scales, partials, states, (threadgroup uint*)query_words, scratch,
      {POSITION});
""",
)

MERGE = Kernel(
    "turboquant_merge",
    "turboquant",
    ("partials", "states", "queries", "centre", "value_factors", "seq_lens", "sinks")
    + ("params", "scales"),
    ("output",),
    SLOTS
    + f"""
  threadgroup float scratch[SIMDGROUPS * (2 * LONGER + 1)];
  merge_splits<Slots, G, Q, SIMDGROUPS, SINKS>(
      partials, states, queries, centre, value_factors, seq_lens, sinks, params, scales, output,
      scratch, {POSITION});
""",
)

DEQUANTIZE = Kernel(
    "turboquant_dequantize",
    "turboquant",
    ("pages", "block_table", "centre", "query_factors", "value_factors")
    + ("key_codebook", "value_codebook", "params", "token"),
    ("keys", "values"),
    SLOTS
    + f"""
  threadgroup float scratch[SIMDGROUPS * 2 * LONGER];
  dequantize_tokens<Slots, SIMDGROUPS, UNROTATE>(
      pages, block_table, centre, query_factors, value_factors, key_codebook, value_codebook,
      params, keys, values, scratch, {POSITION});
""",
)


def codebook(format: Format, head_size: int) -> mx.array:
    """What the kernels know of a format: float32, c1 c3 c5 - , 5 scale factors, ..., midpoints."""
    numbers = np.zeros(CODEBOOK_MIDPOINTS + format.num_codes // 2, np.float32)
    coefficients = format.coefficients(head_size)
    numbers[: len(coefficients)] = coefficients
    factors = format.scale_factors(head_size)
    numbers[CODEBOOK_FACTORS : CODEBOOK_FACTORS + len(factors)] = factors
    positive = format.midpoints(head_size)[format.num_codes // 2 :]
    numbers[CODEBOOK_MIDPOINTS : CODEBOOK_MIDPOINTS + len(positive)] = positive
    return mx.array(numbers)


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

    layout: SlotLayout
    target: Target
    num_cores: int = 0
    """Cores of the GPU; 0 asks the device."""
    max_rows: int = 0
    """Query rows that a simdgroup serves at most, 1 to 8; 0 chooses by device. Each takes 16
    registers of 32 bits for its output: Apple GPUs before M3 have 128 in all."""
    _kernels: dict[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        layout = self.layout
        self.num_cores = self.num_cores or core_count(self.target)
        self.max_rows = self.max_rows or rows_per_simdgroup(self.target)
        largest = max(layout.key_head_size, layout.value_head_size)
        self.max_rows = max(1, min(self.max_rows, 2048 // largest))
        self.key_codebook = codebook(layout.key_format, layout.key_head_size)
        self.value_codebook = codebook(layout.value_format, layout.value_head_size)
        for kernel in (STORE, DECODE, MERGE, DEQUANTIZE):
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
            template=[*self.layout.template(), ("SIMDGROUPS", STORE_SIMDGROUPS)],
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
        split_tokens, splits = self.splits(batch, max_seq_len, tiles, num_queries, window)
        params = _integers((split_tokens, splits, window, block_table.shape[1], 0, 0, 0, 0))
        scales = _floats((scale, softcap) + (0.0,) * 6)
        template = [*self.layout.template(), ("G", group), ("Q", num_queries)]
        partials, states = self._kernels[DECODE.name](
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
                ("R", -(-rows // tiles)),
                ("SIMDGROUPS", DECODE_SIMDGROUPS),
                ("SOFTCAP", int(softcap > 0)),
            ],
            grid=(
                self.layout.num_kv_heads * tiles * DECODE_SIMDGROUPS * SIMD_SIZE,
                splits,
                batch,
            ),
            threadgroup=(DECODE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[
                (batch, splits, num_queries * heads, self.layout.value_head_size),
                (batch, splits, num_queries * heads, 2),
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
        rotated: bool = False,
    ) -> tuple[mx.array, mx.array]:  # [H, count, Dk], [H, count, Dv]
        """Tokens first .. first + count - 1 of a request, as the model had them.

        `rotated` leaves out the last step: k' and v' of codec.py, for rotated queries.
        Raises ValueError if `first` is odd.
        """
        if first % 2:
            raise ValueError(f"first token {first} is odd")
        layout = self.layout
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
                _integers((first, count, 0, 0, 0, 0, 0, 0)),
                token,
            ],
            template=[
                *layout.template(),
                ("SIMDGROUPS", STORE_SIMDGROUPS),
                ("UNROTATE", int(not rotated)),
            ],
            grid=(groups * STORE_SIMDGROUPS * SIMD_SIZE, layout.num_kv_heads, 1),
            threadgroup=(STORE_SIMDGROUPS * SIMD_SIZE, 1, 1),
            output_shapes=[
                (layout.num_kv_heads, count, layout.key_head_size),
                (layout.num_kv_heads, count, layout.value_head_size),
            ],
            output_dtypes=[dtype, dtype],
        )
        return keys, values

    def splits(
        self, batch: int, max_seq_len: int, tiles: int, num_queries: int, window: int
    ) -> tuple[int, int]:
        """(tokens of a split, splits) so that every core has work.

        Powers of two, so that neighbouring lengths share a launch.
        """
        tokens = max_seq_len
        if window:
            tokens = min(tokens, window + num_queries)
        wanted = self.num_cores * GROUPS_PER_CORE
        groups = batch * self.layout.num_kv_heads * tiles
        size = MIN_SPLIT_TOKENS
        while size < tokens and groups * -(-tokens // size) > wanted:
            size *= 2
        return size, max(1, -(-tokens // size))


GROUPS_PER_CORE = 8
MIN_SPLIT_TOKENS = 128


def core_count(target: Target) -> int:
    """Cores of the GPU that `target` runs on; a guess where the device does not say."""
    if target.name == "cuda":
        return 132
    return 16 if target.name == "metal" else 1


def rows_per_simdgroup(target: Target) -> int:
    """Query rows that a simdgroup serves, by the registers of the GPU."""
    return 4 if target.name == "metal" else 8


@lru_cache(maxsize=256)
def _integers(numbers: tuple[int, ...], dtype: mx.Dtype = mx.int32) -> mx.array:
    return mx.array(numbers, dtype)


@lru_cache(maxsize=256)
def _floats(numbers: tuple[float, ...]) -> mx.array:
    return mx.array(numbers, mx.float32)
