"""The kernels of `kernels/turboquant.metal` as MLX launches them: names of buffers and bodies.

A body names the slot layout, declares threadgroup memory and calls one function of the file.
"""

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.kernel_library import Kernel
from vllm_metal.metal_kernel_backend.turboquant.formats import Format

CODEBOOK_FACTORS = 4
CODEBOOK_MIDPOINTS = 16

SLOTS = """
  using Slots = PageLayout<
      NUM_KV_HEADS, BLOCK_SIZE, KEY_HEAD_SIZE, VALUE_HEAD_SIZE, KEY_BITS, VALUE_BITS, KEY_TERMS,
      VALUE_TERMS, KEY_HAS_LEVELS, KEY_HAS_BIAS, PAGE_BYTES, HEAD_PAGE_BYTES, VALUE_CODES_OFFSET,
      KEY_LEVELS_OFFSET, KEY_SCALES_OFFSET, KEY_BIASES_OFFSET, VALUE_SCALES_OFFSET>;
"""

POSITION = """threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup"""

STORE = Kernel(
    "turboquant_store",
    "turboquant",
    ("slot access", "rotation", "quantisation", "store"),
    ("pages", "keys", "values", "slot_mapping", "centre", "key_factors", "value_factors")
    + ("key_codebook", "value_codebook", "params", "after"),
    ("token",),
    SLOTS
    + f"""
  threadgroup uchar codes[SIMDGROUPS * (Slots::longer + Slots::longer / CHUNK)];
  store_vectors<Slots, SIMDGROUPS>(
      pages, keys, values, slot_mapping, centre, key_factors, value_factors, key_codebook,
      value_codebook, params, token, codes, {POSITION});
""",
)

DECODE = Kernel(
    "turboquant_decode",
    "turboquant",
    ("slot access", "unpacking", "codebook", "rotation", "sums over lanes", "online softmax")
    + ("splits", "decode"),
    ("pages", "queries", "query_factors", "centre", "block_table", "seq_lens")
    + ("key_codebook", "value_codebook", "params", "scales", "token"),
    ("partials", "states"),
    SLOTS
    + f"""
  using Attention = Decode<Slots, G, Q, R, TOKENS, SIMDGROUPS, SOFTCAP>;
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
    ("slot access", "rotation", "online softmax", "splits", "merge"),
    ("partials", "states", "queries", "centre", "value_factors", "seq_lens", "sinks")
    + ("params", "scales"),
    ("output",),
    SLOTS
    + f"""
  threadgroup float scratch[SIMDGROUPS * (Vector<Slots::value_head_size>::HELD + 1)];
  merge_splits<Slots, G, Q, SIMDGROUPS, SINKS>(
      partials, states, queries, centre, value_factors, seq_lens, sinks, params, scales, output,
      scratch, {POSITION});
""",
)

DEQUANTIZE = Kernel(
    "turboquant_dequantize",
    "turboquant",
    ("slot access", "unpacking", "codebook", "rotation", "dequantize"),
    ("pages", "block_table", "centre", "query_factors", "value_factors")
    + ("key_codebook", "value_codebook", "params", "token"),
    ("keys", "values"),
    SLOTS
    + f"""
  threadgroup float scratch[SIMDGROUPS * 2 * Slots::longer];
  dequantize_tokens<Slots, SIMDGROUPS>(
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
