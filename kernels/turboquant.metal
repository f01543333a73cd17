// TurboQuant: attention straight over compressed pages of a KV cache.
//
// A page is described in vllm_metal/metal_kernel_backend/turboquant/layout.py, the packing of its
// codes in bitpack.py, the numbers its codes stand for in formats.py and quantizer.py. Letters: B
// requests, H KV heads, G query heads of a KV head, Q query tokens of a request, R query rows (of
// the G * Q) that one simdgroup serves, D head size.
//
//   store       a simdgroup per new vector: rotate, quantise, pack, write into its page
//   decode      a threadgroup per (R rows of a KV head, split of the tokens, request): attention
//               of the rows over the split; keys and values are dequantised once for all rows
//   merge       a threadgroup per (query row, request): splits -> output
//   dequantize  a simdgroup per stored vector: a run of tokens of one request to plain K and V
//
// Launchers are in turboquant/launcher.py, the short bodies that declare threadgroup memory and
// call a function of this file in turboquant/kernels.py; they also name the sections (ruled
// headings) that a kernel needs. MSL, C++14, ASCII.

#include <metal_stdlib>
using namespace metal;

#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

constant constexpr int SIMD_SIZE = 32;
constant constexpr int CHUNK = 16;               // codes that are packed together
constant constexpr int CODEBOOK_FACTORS = 4;     // codebook: c1, c3, c5, -, 5 scale factors, ...
constant constexpr int CODEBOOK_MIDPOINTS = 16;  // ... positive midpoints
constant constexpr int NUM_SCALES = 5;
constant constexpr int NUM_LEVELS = 16;   // of a chunk of a key; a centroid is multiplied by
constant constexpr int LEVEL_BASE = 12;   // (LEVEL_BASE + level) * LEVEL_UNIT
constant constexpr int TRIED_LEVELS = 3;
constant constexpr float LEVEL_UNIT = 0.03125f;
constant constexpr float LOG2_E = 1.44269504088896341f;
constant constexpr float LOWEST_SCORE = -1e30f;  // running maximum before the first token
constant constexpr float RESCALE_MARGIN = 8.0f;  // in powers of two

// ----------------------------------------------------------------------------------- slot access
// The only pointer arithmetic on pages.

template <
    int NUM_KV_HEADS, int BLOCK_SIZE, int KEY_HEAD_SIZE, int VALUE_HEAD_SIZE, int KEY_BITS,
    int VALUE_BITS, int KEY_TERMS, int VALUE_TERMS, int KEY_HAS_LEVELS, int KEY_HAS_BIAS,
    int PAGE_BYTES, int HEAD_PAGE_BYTES, int VALUE_CODES_OFFSET, int KEY_LEVELS_OFFSET,
    int KEY_SCALES_OFFSET, int KEY_BIASES_OFFSET, int VALUE_SCALES_OFFSET>
struct PageLayout {
  static constant constexpr int num_kv_heads = NUM_KV_HEADS;
  static constant constexpr int block_size = BLOCK_SIZE;
  static constant constexpr int key_head_size = KEY_HEAD_SIZE;
  static constant constexpr int value_head_size = VALUE_HEAD_SIZE;
  static constant constexpr int longer =
      KEY_HEAD_SIZE > VALUE_HEAD_SIZE ? KEY_HEAD_SIZE : VALUE_HEAD_SIZE;
  static constant constexpr int key_bits = KEY_BITS;
  static constant constexpr int value_bits = VALUE_BITS;
  static constant constexpr int key_terms = KEY_TERMS;
  static constant constexpr int value_terms = VALUE_TERMS;
  static constant constexpr bool key_has_levels = KEY_HAS_LEVELS;
  static constant constexpr bool key_has_bias = KEY_HAS_BIAS;

  // One KV head's page of a block.
  static METAL_FUNC const device uchar* head_page(
      const device ushort* pages, int block, int kv_head) {
    ulong begin = ulong(uint(block)) * PAGE_BYTES + uint(kv_head * HEAD_PAGE_BYTES);
    return (const device uchar*)pages + begin;
  }

  // Codes of chunk `chunk` of the key or value in slot `slot` of a head page.
  static METAL_FUNC const device uchar* key_codes(
      const device uchar* page, uint slot, uint chunk) {
    return page + (slot * (KEY_HEAD_SIZE * KEY_BITS / 8) + chunk * (2 * KEY_BITS));
  }

  static METAL_FUNC const device uchar* value_codes(
      const device uchar* page, uint slot, uint chunk) {
    return page +
        (VALUE_CODES_OFFSET + slot * (VALUE_HEAD_SIZE * VALUE_BITS / 8) + chunk * (2 * VALUE_BITS));
  }

  // A key or value codes plus this are the next slot's.
  static constant constexpr int next_key = KEY_HEAD_SIZE * KEY_BITS / 8;
  static constant constexpr int next_value = VALUE_HEAD_SIZE * VALUE_BITS / 8;

  // A halfword for each slot: the levels of chunk `chunk` and its three neighbours, 4 bits each.
  static METAL_FUNC const device uchar* key_levels(
      const device uchar* page, uint slot, uint chunk) {
    return page + (KEY_LEVELS_OFFSET + 2 * slot + chunk / 4 * (2 * BLOCK_SIZE));
  }

  // float16, one for each slot.
  static METAL_FUNC const device uchar* key_scale(const device uchar* page, uint slot) {
    return page + (KEY_SCALES_OFFSET + 2 * slot);
  }

  static METAL_FUNC const device uchar* key_bias(const device uchar* page, uint slot) {
    return page + (KEY_BIASES_OFFSET + 2 * slot);
  }

  static METAL_FUNC const device uchar* value_scale(const device uchar* page, uint slot) {
    return page + (VALUE_SCALES_OFFSET + 2 * slot);
  }
};

// The scales (or biases, or levels) of an even slot and the next.
METAL_FUNC uint load_pair(const device uchar* scales) { return *(const device uint*)scales; }

// ------------------------------------------------------------------------------------- unpacking
// Two neighbouring tokens ride in the two halves of each word: pairs[j] holds halfword j of a
// chunk of token A below halfword j of the same chunk of token B.

METAL_FUNC void load_words(const device uchar* codes, thread uint (&words)[1]) {
  words[0] = *(const device uint*)codes;
}

METAL_FUNC void load_words(const device uchar* codes, thread uint (&words)[2]) {
  uint2 loaded = *(const device uint2*)codes;
  words[0] = loaded.x;
  words[1] = loaded.y;
}

METAL_FUNC void load_words(const device uchar* codes, thread uint (&words)[3]) {
  UNROLL
  for (int i = 0; i < 3; i++) {
    words[i] = ((const device uint*)codes)[i];
  }
}

METAL_FUNC void load_words(const device uchar* codes, thread uint (&words)[4]) {
  uint4 loaded = *(const device uint4*)codes;
  words[0] = loaded.x;
  words[1] = loaded.y;
  words[2] = loaded.z;
  words[3] = loaded.w;
}

// A chunk of both tokens as it lies in memory. Loading does not wait; taking the pairs does.
template <int BITS, bool EVEN = BITS % 2 == 0>
struct Chunk {
  uint a[BITS / 2], b[BITS / 2];

  METAL_FUNC void load(const device uchar* codes_a, const device uchar* codes_b) thread {
    load_words(codes_a, a);
    load_words(codes_b, b);
  }

  METAL_FUNC void pairs(thread uint (&pairs)[BITS]) const thread {
    UNROLL
    for (int i = 0; i < BITS / 2; i++) {
      ushort2 from_a = as_type<ushort2>(a[i]), from_b = as_type<ushort2>(b[i]);
      pairs[2 * i] = as_type<uint>(ushort2(from_a.x, from_b.x));
      pairs[2 * i + 1] = as_type<uint>(ushort2(from_a.y, from_b.y));
    }
  }
};

// Odd widths: a chunk begins on any halfword.
template <int BITS>
struct Chunk<BITS, false> {
  ushort a[BITS], b[BITS];

  METAL_FUNC void load(const device uchar* codes_a, const device uchar* codes_b) thread {
    UNROLL
    for (int j = 0; j < BITS; j++) {
      a[j] = ((const device ushort*)codes_a)[j];
      b[j] = ((const device ushort*)codes_b)[j];
    }
  }

  METAL_FUNC void pairs(thread uint (&pairs)[BITS]) const thread {
    UNROLL
    for (int j = 0; j < BITS; j++) {
      pairs[j] = as_type<uint>(ushort2(a[j], b[j]));
    }
  }
};

// A piece of code `rest` (of those in spare bits) lies in halfword j at bit `source`; returns the
// piece, in both halves, where the code begins at bit 1.
template <int BITS>
METAL_FUNC uint spare_piece(uint pair, int j, int rest) {
  constexpr int SPARE = 16 % BITS;
  int first = rest * BITS > j * SPARE ? rest * BITS : j * SPARE;
  int last = (rest + 1) * BITS < (j + 1) * SPARE ? (rest + 1) * BITS : (j + 1) * SPARE;
  if (last <= first) {
    return 0;
  }
  int source = 16 - SPARE + first - j * SPARE;
  int target = 1 + first - rest * BITS;
  return (pair >> (source - target)) & ((((1u << (last - first)) - 1) << target) * 0x10001u);
}

#ifndef BITS_OVER
// The bits of a word under a mask, over other bits.
METAL_FUNC uint bits_over(uint word, uint mask, uint other) { return (word & mask) | other; }
#endif

// Code i of both tokens as (2 code - (n - 1)) / n, n = 2^BITS: the points of a grid in (-1, 1).
// A field placed at bits 1..10 under the exponent of 1024 is a half, without shift or conversion;
// every step is exact.
template <int BITS>
METAL_FUNC half2 grid_point(const thread uint (&pairs)[BITS], int i) {
  constexpr int FIELDS = 16 / BITS;
  constexpr int HIGH_SHIFT = BITS == 6 ? 4 : (BITS == 4 || BITS == 8) ? 7 : 8;
  constexpr uint MASK = (1u << BITS) - 1;
  uint word = 0, mask = (MASK << 1) * 0x10001u;
  int position = 1;
  if (i < BITS * FIELDS) {
    word = pairs[i / FIELDS];
    position = i % FIELDS * BITS;
    if (position == 0) {
      word += word;
      position = 1;
    } else if (position + BITS > 10) {
      word >>= HIGH_SHIFT;
      position -= HIGH_SHIFT;
    }
    mask = (MASK << position) * 0x10001u;
  } else {
    UNROLL
    for (int j = 0; j < BITS; j++) {
      word |= spare_piece<BITS>(pairs[j], j, i - BITS * FIELDS);
    }
  }
  float step = 1.0f / float((1 << BITS) << (position - 1));
  half scale = half(step);
  half offset = half(-1024.0f * step - float((1 << BITS) - 1) / float(1 << BITS));
  return fma(as_type<half2>(bits_over(word, mask, 0x64006400u)), half2(scale, scale),
             half2(offset, offset));
}

// What multiplies the centroids of chunk `chunk` of both tokens, from their levels; exact.
METAL_FUNC half2 level_weights(uint levels, uint chunk) {
  constexpr float OFFSET = (float(LEVEL_BASE) - 1024.0f) * LEVEL_UNIT;
  uint word = bits_over(levels >> (chunk % 4 * 4), 0x000f000fu, 0x64006400u);
  half unit = half(LEVEL_UNIT), offset = half(OFFSET);
  return fma(as_type<half2>(word), half2(unit, unit), half2(offset, offset));
}

// -------------------------------------------------------------------------------------- codebook
// centroid(code) = c1 x + c3 x^3 + c5 x^5, x = code - (n - 1) / 2 = g n / 2 with g a grid point.
// With the highest coefficient in the unit, which is left to the caller, the rest is
//   degree 3: g (g^2 + shift)        degree 5: g ((g^2 + shift)^2 + rest)
// and takes one operation for each coefficient.

template <int BITS, int TERMS>
struct Codebook {
  float unit;
  half2 shift;
  half2 rest;

  METAL_FUNC Codebook(const device float* coefficients) {
    constexpr float SQUARE = float(1 << BITS) * float(1 << BITS) * 0.25f;
    float c1 = coefficients[0], c3 = 0.0f, a = 0.0f, b = 0.0f;
    unit = c1;
    if (TERMS == 2) {
      c3 = coefficients[1] * SQUARE;
      unit = c3;
      a = c1 / c3;
    }
    if (TERMS == 3) {
      c3 = coefficients[1] * SQUARE;
      unit = coefficients[2] * (SQUARE * SQUARE);
      a = c3 / unit * 0.5f;
      b = c1 / unit - a * a;
    }
    unit *= float(1 << BITS) * 0.5f;
    shift = half2(half(a), half(a));
    rest = half2(half(b), half(b));
  }

  METAL_FUNC half2 at(half2 g) const thread {
    if (TERMS == 1) {
      return g;
    }
    half2 square = fma(g, g, shift);
    return g * (TERMS > 2 ? fma(square, square, rest) : square);
  }
};

// -------------------------------------------------------------------------------------- rotation

#ifndef ROUNDED_PRODUCT
// A product that no later addition may be fused with.
METAL_FUNC float rounded_product(float a, float b) {
#pragma clang fp contract(off)
  return a * b;
}
#endif

#ifndef ROUGH_INVERSE
// 1 / x with an error of a few units in the last place at most.
METAL_FUNC float rough_inverse(float x) { return 1.0f / x; }
#endif

// A vector of D = M * 2^k elements, spread over a simdgroup: lane l holds elements l W .. l W + W-1
// of each of the M blocks of 2^k. Lanes past the end of a short block hold zeros.

template <int D>
struct Vector {
  static constant constexpr int POWER = D & -D;
  static constant constexpr int M = D / POWER;
  static constant constexpr int W = POWER > SIMD_SIZE ? POWER / SIMD_SIZE : 1;
  static constant constexpr int HELD = M * W * SIMD_SIZE;  // by all lanes, zeros included
  float x[M][W];

  static METAL_FUNC bool holds(int lane) { return lane * W < POWER; }

  static METAL_FUNC int index(int lane, int block, int i) {
    return block * POWER + lane * W + i;
  }

  // R x of rotation.py, which defines the rounding.
  METAL_FUNC void rotate(int lane) thread {
    constexpr bool SQUARE = POWER == 16 || POWER == 64 || POWER == 256;
    constexpr float SCALE = (SQUARE ? 1.0f : 0.70710678118654752f) /
        (POWER >= 256 ? 16.0f : POWER >= 64 ? 8.0f : 4.0f);
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int distance = 1; distance < W; distance *= 2) {
        UNROLL
        for (int i = 0; i < W; i++) {
          if ((i & distance) == 0) {
            float a = x[block][i], b = x[block][i + distance];
            x[block][i] = a + b;
            x[block][i + distance] = a - b;
          }
        }
      }
      UNROLL
      for (int distance = 1; distance < POWER / W; distance *= 2) {
        UNROLL
        for (int i = 0; i < W; i++) {
          float other = simd_shuffle_xor(x[block][i], ushort(distance));
          x[block][i] = (lane & distance) ? other - x[block][i] : x[block][i] + other;
        }
      }
      UNROLL
      for (int i = 0; i < W; i++) {
        x[block][i] = rounded_product(x[block][i], SCALE);
      }
    }
    if (M > 1) {
      UNROLL
      for (int i = 0; i < W; i++) {
        float total = x[0][i];
        UNROLL
        for (int block = 1; block < M; block++) {
          total += x[block][i];
        }
        total = rounded_product(total, 2.0f / float(M));
        UNROLL
        for (int block = 0; block < M; block++) {
          x[block][i] -= total;
        }
      }
    }
  }

  // Sum of the elements in the order of rotation.tree_sum; the same in every lane.
  METAL_FUNC float tree_sum() const thread {
    float total = 0.0f;
    UNROLL
    for (int block = 0; block < M; block++) {
      float sums[W];
      UNROLL
      for (int i = 0; i < W; i++) {
        sums[i] = x[block][i];
      }
      UNROLL
      for (int distance = 1; distance < W; distance *= 2) {
        UNROLL
        for (int i = 0; i < W; i += 2 * distance) {
          sums[i] += sums[i + distance];
        }
      }
      UNROLL
      for (int distance = 1; distance < SIMD_SIZE; distance *= 2) {
        sums[0] += simd_shuffle_xor(sums[0], ushort(distance));
      }
      total = block == 0 ? sums[0] : total + sums[0];
    }
    return total;
  }
};

// ------------------------------------------------------------------------------- sums over lanes
// Lane l of LANES neighbours, `stride` apart, ends with elements first .. first + N / LANES - 1 of
// the sum of their arrays v, first = l N / LANES; `spread` is the way back, without the sum. With
// fewer elements than lanes, neighbours share an element.

template <int N, int LANES>
METAL_FUNC void fold(thread float (&v)[N], int lane, int stride) {
  int n = N;
  UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    bool upper = lane & (mask * stride);
    if (n > 1) {
      n /= 2;
      UNROLL
      for (int i = 0; i < N / 2; i++) {
        if (i < n) {
          float kept = upper ? v[i + n] : v[i];
          float sent = upper ? v[i] : v[i + n];
          v[i] = kept + simd_shuffle_xor(sent, ushort(mask * stride));
        }
      }
    } else {
      v[0] += simd_shuffle_xor(v[0], ushort(mask * stride));
    }
  }
}

// The first step of `fold` for two elements and their partners, while they are halves.
METAL_FUNC half2 fold_halves(half2 lower, half2 higher, int lane, int mask) {
  bool upper = lane & mask;
  float sent = as_type<float>(upper ? lower : higher);
  return (upper ? higher : lower) + as_type<half2>(simd_shuffle_xor(sent, ushort(mask)));
}

template <int N, int LANES>
METAL_FUNC void spread(thread float (&v)[N], int lane) {
  int n = N > LANES ? N / LANES : 1;
  UNROLL
  for (int mask = N > LANES ? 1 : LANES / N; mask < LANES; mask *= 2) {
    bool upper = lane & mask;
    UNROLL
    for (int i = 0; i < N / 2; i++) {
      if (i < n) {
        float own = v[i];
        float other = simd_shuffle_xor(own, ushort(mask));
        v[i] = upper ? other : own;
        v[i + n] = upper ? own : other;
      }
    }
    n *= 2;
  }
}

// -------------------------------------------------------------------------------- online softmax

// Softmax weights relative to 2^max. Empty: max = LOWEST_SCORE, sum = 0.
struct SoftmaxState {
  float max;
  float sum;

  METAL_FUNC SoftmaxState() : max(LOWEST_SCORE), sum(0.0f) {}

  // Takes one more score, in powers of two; returns its weight.
  METAL_FUNC float update(float score) thread {
    float weight = fast::exp2(score - max);
    sum += weight;
    return weight;
  }

  // Moves to another maximum; returns the factor for all weights given out before.
  METAL_FUNC float rescale(float new_max) thread {
    float factor = fast::exp2(max - new_max);
    max = new_max;
    sum *= factor;
    return factor;
  }

  // 1 / sum, or 0 when there was nothing to attend to.
  METAL_FUNC float normaliser() const thread { return sum > 0.0f ? 1.0f / sum : 0.0f; }
};

// ---------------------------------------------------------------------------------- quantisation

// How many of width, 2 width, ... last width, each rounded, are at most the magnitude; a whole
// number. `inverse` is 1 / width, roughly, so that the first guess is off by one at most.
METAL_FUNC float multiples(float magnitude, float width, float inverse, int last) {
  float count = min(floor(magnitude * inverse), float(last));
  count -= magnitude < rounded_product(count, width) ? 1.0f : 0.0f;
  count += magnitude >= rounded_product(count + 1.0f, width) ? 1.0f : 0.0f;
  return magnitude >= rounded_product(float(last), width) ? float(last) : count;
}

// A rotated vector to codes and a scale, as quantizer.py has it: same operations, same rounding.
template <int D, int BITS, int TERMS, bool HAS_BIAS, bool UNBIASED>
struct Quantizer {
  static constant constexpr int HALF = 1 << (BITS - 1);
  static constant constexpr int M = Vector<D>::M;
  static constant constexpr int W = Vector<D>::W;

  // How many positive midpoints, times the scale, are at most the magnitude.
  static METAL_FUNC int steps(const device float* codebook, float magnitude, float scale) {
    if (TERMS > 1) {
      int count = 0;
      UNROLL
      for (int jump = HALF / 2; jump > 0; jump /= 2) {
        float bound = rounded_product(scale, codebook[CODEBOOK_MIDPOINTS + count + jump - 1]);
        count += bound <= magnitude ? jump : 0;
      }
      return count;
    }
    float width = rounded_product(scale, codebook[0]);
    return int(multiples(magnitude, width, rough_inverse(width), HALF - 1));
  }

  static METAL_FUNC float centroid(const device float* codebook, int steps) {
    float x = float(steps) + 0.5f;
    float square = rounded_product(x, x);
    float value = codebook[TERMS - 1];
    UNROLL
    for (int term = TERMS - 2; term >= 0; term--) {
      value = rounded_product(square, value) + codebook[term];
    }
    return rounded_product(x, value);
  }

  // Writes the codes to threadgroup memory. y changes.
  static METAL_FUNC void quantize(
      thread Vector<D>& y, const device float* codebook, threadgroup uchar* codes,
      thread half& scale, thread half& bias, int lane) {
    const bool holds = Vector<D>::holds(lane);
    float low = INFINITY, high = -INFINITY;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        y.x[block][i] = min(max(y.x[block][i], -16777216.0f), 16777216.0f);
        low = holds ? min(low, y.x[block][i]) : low;
        high = holds ? max(high, y.x[block][i]) : high;
      }
    }
    low = -simd_max(-low);
    high = simd_max(high);
    if (HAS_BIAS) {
      bias = half(min(max(rounded_product(high + low, 0.5f), -65504.0f), 65504.0f));
      low -= float(bias);
      high -= float(bias);
    }
    float largest = max(-low, high);

    // Square of the length; and the candidate scale whose centroids point closest to y.
    Vector<D> term;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        y.x[block][i] -= HAS_BIAS && holds ? float(bias) : 0.0f;
        term.x[block][i] = rounded_product(y.x[block][i], y.x[block][i]);
      }
    }
    float square = UNBIASED ? term.tree_sum() : 0.0f;
    float best_ratio = -1.0f, best_along = 0.0f, best_energy = 1.0f, best_scale = 0.0f;
    for (int candidate = 0; candidate < NUM_SCALES; candidate++) {
      float trial = rounded_product(largest, codebook[CODEBOOK_FACTORS + candidate]);
      Vector<D> squares;
      UNROLL
      for (int block = 0; block < M; block++) {
        UNROLL
        for (int i = 0; i < W; i++) {
          float magnitude = abs(y.x[block][i]);
          float c = holds ? centroid(codebook, steps(codebook, magnitude, trial)) : 0.0f;
          term.x[block][i] = rounded_product(magnitude, c);
          squares.x[block][i] = rounded_product(c, c);
        }
      }
      float along = term.tree_sum(), energy = squares.tree_sum();
      float ratio = rounded_product(along, along) / energy;
      if (ratio > best_ratio) {
        best_ratio = ratio;
        best_along = along;
        best_energy = energy;
        best_scale = trial;
      }
    }
    float exact = UNBIASED ? square / (best_along > 0.0f ? best_along : 1.0f)
                           : best_along / best_energy;
    scale = half(min(exact, 65504.0f));

    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        int count = steps(codebook, abs(y.x[block][i]), best_scale);
        if (holds) {
          codes[Vector<D>::index(lane, block, i)] =
              uchar(y.x[block][i] >= 0.0f ? HALF + count : HALF - 1 - count);
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Packs the codes, chunk by chunk, as bitpack.py has it. Whole halfwords; nothing is read back.
  static METAL_FUNC void pack(const threadgroup uchar* codes, device ushort* target, int lane) {
    constexpr int FIELDS = 16 / BITS;
    constexpr int SPARE = 16 % BITS;
    for (int chunk = lane; chunk < D / CHUNK; chunk += SIMD_SIZE) {
      const threadgroup uchar* code = codes + chunk * CHUNK;
      uint rest = 0;
      UNROLL
      for (int i = BITS * FIELDS; i < CHUNK; i++) {
        rest |= uint(code[i]) << ((i - BITS * FIELDS) * BITS);
      }
      UNROLL
      for (int j = 0; j < BITS; j++) {
        uint halfword = ((rest >> (j * SPARE)) & ((1u << SPARE) - 1)) << (16 - SPARE);
        UNROLL
        for (int i = 0; i < FIELDS; i++) {
          halfword |= uint(code[j * FIELDS + i]) << (i * BITS);
        }
        target[chunk * BITS + j] = ushort(halfword);
      }
    }
  }
};

// A rotated key to codes, levels and a scale, as grouped_quantizer.py has it. A group is a chunk.
template <int D, int BITS>
struct GroupedQuantizer {
  static constant constexpr int HALF = 1 << (BITS - 1);
  static constant constexpr int M = Vector<D>::M;
  static constant constexpr int W = Vector<D>::W;

  // The sum of a group, for each block: neighbours in pairs, then pairs of pairs.
  static METAL_FUNC void group_sums(const thread Vector<D>& v, thread float (&sums)[M]) {
    UNROLL
    for (int block = 0; block < M; block++) {
      float held[W];
      UNROLL
      for (int i = 0; i < W; i++) {
        held[i] = v.x[block][i];
      }
      UNROLL
      for (int distance = 1; distance < W; distance *= 2) {
        UNROLL
        for (int i = 0; i < W; i += 2 * distance) {
          held[i] += held[i + distance];
        }
      }
      UNROLL
      for (int distance = 1; distance < CHUNK / W; distance *= 2) {
        held[0] += simd_shuffle_xor(held[0], ushort(distance));
      }
      sums[block] = held[0];
    }
  }

  // The lowest level whose grid reaches the group's largest magnitude, or one from which all that
  // are tried exist.
  static METAL_FUNC int lowest_level(float reach, float scale) {
    float unit = rounded_product(scale, 4.0f * LEVEL_UNIT);
    int filled = int(multiples(reach, unit, rough_inverse(unit), LEVEL_BASE + NUM_LEVELS - 1));
    return min(max(filled + 1 - LEVEL_BASE, 0), NUM_LEVELS - TRIED_LEVELS);
  }

  // Weight of a level times the width of a cell.
  static METAL_FUNC float weight(int level, float step) {
    return float(LEVEL_BASE + level) * LEVEL_UNIT * step;
  }

  // Writes codes and levels to threadgroup memory. y changes.
  static METAL_FUNC void quantize(
      thread Vector<D>& y, const device float* codebook, threadgroup uchar* codes,
      threadgroup uchar* levels, thread half& scale, int lane) {
    const bool holds = Vector<D>::holds(lane);
    const float step = codebook[0];
    float reach[M], largest = 0.0f;
    UNROLL
    for (int block = 0; block < M; block++) {
      reach[block] = 0.0f;
      UNROLL
      for (int i = 0; i < W; i++) {
        y.x[block][i] = min(max(y.x[block][i], -16777216.0f), 16777216.0f);
        reach[block] = max(reach[block], abs(y.x[block][i]));
      }
      UNROLL
      for (int distance = 1; distance < CHUNK / W; distance *= 2) {
        reach[block] = max(reach[block], simd_shuffle_xor(reach[block], ushort(distance)));
      }
      largest = max(largest, reach[block]);
    }
    largest = simd_max(largest);

    float best_ratio = -1.0f, best_along = 0.0f, best_energy = 1.0f, best_scale = 0.0f;
    int best_levels[M];
    UNROLL
    for (int block = 0; block < M; block++) {
      best_levels[block] = 0;
    }
    UNROLL
    for (int candidate = 0; candidate < NUM_SCALES; candidate++) {
      float trial = rounded_product(largest, codebook[CODEBOOK_FACTORS + candidate]);
      // Each group takes the level with the least error.
      Vector<D> terms, squares, tried_terms, tried_squares;
      int lowest[M], taken[M];
      float best_gain[M];
      UNROLL
      for (int block = 0; block < M; block++) {
        lowest[block] = taken[block] = lowest_level(reach[block], trial);
        best_gain[block] = -INFINITY;
      }
      UNROLL
      for (int which = 0; which < TRIED_LEVELS; which++) {
        UNROLL
        for (int block = 0; block < M; block++) {
          float cell = weight(lowest[block] + which, step);
          float width = rounded_product(trial, cell), inverse = rough_inverse(width);
          UNROLL
          for (int i = 0; i < W; i++) {
            float magnitude = abs(y.x[block][i]);
            float c = (multiples(magnitude, width, inverse, HALF - 1) + 0.5f) * cell;
            c = holds ? c : 0.0f;
            tried_terms.x[block][i] = rounded_product(magnitude, c);
            tried_squares.x[block][i] = rounded_product(c, c);
          }
        }
        float along[M], energy[M];
        group_sums(tried_terms, along);
        group_sums(tried_squares, energy);
        UNROLL
        for (int block = 0; block < M; block++) {
          float gain = 2.0f * along[block] - rounded_product(trial, energy[block]);
          bool better = which == 0 || gain > best_gain[block];
          best_gain[block] = better ? gain : best_gain[block];
          taken[block] = better ? lowest[block] + which : taken[block];
          UNROLL
          for (int i = 0; i < W; i++) {
            terms.x[block][i] = better ? tried_terms.x[block][i] : terms.x[block][i];
            squares.x[block][i] = better ? tried_squares.x[block][i] : squares.x[block][i];
          }
        }
      }
      float along = terms.tree_sum(), energy = squares.tree_sum();
      float ratio = rounded_product(along, along) / energy;
      if (ratio > best_ratio) {
        best_ratio = ratio;
        best_along = along;
        best_energy = energy;
        best_scale = trial;
        UNROLL
        for (int block = 0; block < M; block++) {
          best_levels[block] = taken[block];
        }
      }
    }
    scale = half(min(best_along / best_energy, 65504.0f));

    UNROLL
    for (int block = 0; block < M; block++) {
      float width = rounded_product(best_scale, weight(best_levels[block], step));
      float inverse = rough_inverse(width);
      UNROLL
      for (int i = 0; i < W; i++) {
        int count = int(multiples(abs(y.x[block][i]), width, inverse, HALF - 1));
        int index = Vector<D>::index(lane, block, i);
        if (holds) {
          codes[index] = uchar(y.x[block][i] >= 0.0f ? HALF + count : HALF - 1 - count);
          if (index % CHUNK == 0) {
            levels[index / CHUNK] = uchar(best_levels[block]);
          }
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
};

// ----------------------------------------------------------------------------------------- store

// By its bits, which no optimisation of the compiler for finite numbers touches.
METAL_FUNC bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// Stores one new key or value; values that are no numbers become 0. Writes through `pages`, an
// input of the kernel: readers must bind the kernel's output to be ordered after it.
template <
    typename Slots, bool KEY, int D, int BITS, int TERMS, bool HAS_LEVELS, bool HAS_BIAS,
    typename T>
METAL_FUNC void store_vector(
    const device T* vector, const device float* centre, const device float* factors,
    const device float* codebook, const device uchar* page, uint slot, threadgroup uchar* codes,
    int lane) {
  Vector<D> y;
  UNROLL
  for (int block = 0; block < Vector<D>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<D>::W; i++) {
      int index = Vector<D>::index(lane, block, i);
      float element = Vector<D>::holds(lane) ? float(vector[index]) : 0.0f;
      element = KEY || is_finite(element) ? element : 0.0f;
      if (Vector<D>::holds(lane)) {
        element = rounded_product(KEY ? element - centre[index] : element, factors[index]);
      }
      y.x[block][i] = element;
    }
  }
  y.rotate(lane);
  half scale = half(0.0f), bias = half(0.0f);
  threadgroup uchar* levels = codes + D;
  if (HAS_LEVELS) {
    GroupedQuantizer<D, BITS>::quantize(y, codebook, codes, levels, scale, lane);
    for (int quad = lane; quad < (D / CHUNK + 3) / 4; quad += SIMD_SIZE) {
      uint halfword = 0;
      UNROLL
      for (int i = 0; i < 4; i++) {
        int chunk = quad * 4 + i;
        halfword |= chunk < D / CHUNK ? uint(levels[chunk]) << (i * 4) : 0u;
      }
      *(device ushort*)Slots::key_levels(page, slot, quad * 4) = ushort(halfword);
    }
  } else {
    Quantizer<D, BITS, TERMS, HAS_BIAS, !KEY>::quantize(y, codebook, codes, scale, bias, lane);
  }
  const device uchar* target =
      KEY ? Slots::key_codes(page, slot, 0) : Slots::value_codes(page, slot, 0);
  Quantizer<D, BITS, TERMS, HAS_BIAS, !KEY>::pack(codes, (device ushort*)target, lane);
  if (lane == 0) {
    *(device half*)(KEY ? Slots::key_scale(page, slot) : Slots::value_scale(page, slot)) = scale;
    if (HAS_BIAS) {
      *(device half*)Slots::key_bias(page, slot) = bias;
    }
  }
}

// All new vectors of a layer: keys [T, H, Dk], values [T, H, Dv]. Slots below 0 are skipped.
template <typename Slots, int SIMDGROUPS, typename T, typename Mapping, typename Params>
METAL_FUNC void store_vectors(
    const device ushort* pages, const device T* keys, const device T* values,
    Mapping slot_mapping, const device float* centre, const device float* key_factors,
    const device float* value_factors, const device float* key_codebook,
    const device float* value_codebook, Params params, device uint* token,
    threadgroup uchar* codes, uint3 group, int simdgroup, int lane) {
  constexpr int DK = Slots::key_head_size;
  constexpr int DV = Slots::value_head_size;
  constexpr int H = Slots::num_kv_heads;
  int vector = int(group.x) * SIMDGROUPS + simdgroup;
  if (vector < 8 && lane == 0) {
    token[vector] = 0;
  }
  int row = vector / 2, head = row % H, new_token = row / H;
  if (new_token >= params[0]) {
    return;
  }
  int mapped = slot_mapping[new_token];
  if (mapped < 0) {
    return;
  }
  const device uchar* page = Slots::head_page(pages, mapped / Slots::block_size, head);
  uint slot = mapped % Slots::block_size;
  threadgroup uchar* own_codes = codes + simdgroup * (Slots::longer + Slots::longer / CHUNK);
  if (vector % 2 == 0) {
    store_vector<
        Slots, true, DK, Slots::key_bits, Slots::key_terms, Slots::key_has_levels,
        Slots::key_has_bias>(
        keys + ulong(row) * DK, centre + head * DK, key_factors + head * DK, key_codebook, page,
        slot, own_codes, lane);
  } else {
    store_vector<Slots, false, DV, Slots::value_bits, Slots::value_terms, false, false>(
        values + ulong(row) * DV, centre, value_factors, value_codebook, page, slot, own_codes,
        lane);
  }
}

// ------------------------------------------------------------------------------------ dequantize

// Two neighbouring stored vectors as the model had them, [n, D]. `levels`: of this lane's chunk.
template <int D, int BITS, int TERMS, bool HAS_LEVELS, typename T>
METAL_FUNC void dequantize_pair(
    const device uchar* a, const device uchar* b, uint levels, uint scales, uint biases,
    const device float* codebook, const device float* factors, const device float* centre,
    bool has_centre, bool has_second, device T* output, threadgroup float* scratch, int lane) {
  const Codebook<BITS, TERMS> points(codebook);
  half2 scale = as_type<half2>(scales), bias = as_type<half2>(biases);
  float unit_a = points.unit * float(scale.x), unit_b = points.unit * float(scale.y);
  if (HAS_LEVELS) {
    half2 weights = level_weights(levels, lane);
    unit_a *= float(weights.x);
    unit_b *= float(weights.y);
  }
  if (lane < D / CHUNK) {
    Chunk<BITS> chunk;
    uint pairs[BITS];
    chunk.load(a + lane * 2 * BITS, b + lane * 2 * BITS);
    chunk.pairs(pairs);
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
      half2 point = points.at(grid_point<BITS>(pairs, i));
      scratch[lane * CHUNK + i] = float(point.x) * unit_a + float(bias.x);
      scratch[D + lane * CHUNK + i] = float(point.y) * unit_b + float(bias.y);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int which = 0; which < (has_second ? 2 : 1); which++) {
    Vector<D> y;
    UNROLL
    for (int block = 0; block < Vector<D>::M; block++) {
      UNROLL
      for (int i = 0; i < Vector<D>::W; i++) {
        y.x[block][i] = Vector<D>::holds(lane)
            ? scratch[which * D + Vector<D>::index(lane, block, i)] : 0.0f;
      }
    }
    y.rotate(lane);
    UNROLL
    for (int block = 0; block < Vector<D>::M; block++) {
      UNROLL
      for (int i = 0; i < Vector<D>::W; i++) {
        if (Vector<D>::holds(lane)) {
          int index = Vector<D>::index(lane, block, i);
          output[which * D + index] =
              T(y.x[block][i] * factors[index] + (has_centre ? centre[index] : 0.0f));
        }
      }
    }
  }
}

// Tokens first .. first + n - 1 (first even) of one request, in the KV heads from first_head on:
// keys [heads, n, Dk], values [heads, n, Dv].
template <typename Slots, int SIMDGROUPS, typename T, typename Table, typename Params>
METAL_FUNC void dequantize_tokens(
    const device ushort* pages, Table block_table, const device float* centre,
    const device float* query_factors, const device float* value_factors,
    const device float* key_codebook, const device float* value_codebook, Params params,
    device T* keys, device T* values, threadgroup float* scratch, uint3 group, int simdgroup,
    int lane) {
  constexpr int DK = Slots::key_head_size;
  constexpr int DV = Slots::value_head_size;
  int first = params[0], n = params[1], first_head = params[2];
  int vector = int(group.x) * SIMDGROUPS + simdgroup;
  int offset = vector / 2 * 2, row = group.y, head = first_head + row;
  if (offset >= n) {
    return;
  }
  int token = first + offset;
  const device uchar* page =
      Slots::head_page(pages, block_table[token / Slots::block_size], head);
  uint slot = token % Slots::block_size;
  threadgroup float* own_scratch = scratch + simdgroup * 2 * Slots::longer;
  if (vector % 2 == 0) {
    uint chunk = min(lane, DK / CHUNK - 1);
    dequantize_pair<DK, Slots::key_bits, Slots::key_terms, Slots::key_has_levels>(
        Slots::key_codes(page, slot, 0), Slots::key_codes(page, slot + 1, 0),
        Slots::key_has_levels ? load_pair(Slots::key_levels(page, slot, chunk)) : 0u,
        load_pair(Slots::key_scale(page, slot)),
        Slots::key_has_bias ? load_pair(Slots::key_bias(page, slot)) : 0u, key_codebook,
        query_factors + head * DK, centre + head * DK, true, offset + 1 < n,
        keys + (ulong(row) * n + offset) * DK, own_scratch, lane);
  } else {
    dequantize_pair<DV, Slots::value_bits, Slots::value_terms, false>(
        Slots::value_codes(page, slot, 0), Slots::value_codes(page, slot + 1, 0), 0u,
        load_pair(Slots::value_scale(page, slot)), 0u, value_codebook, value_factors, centre,
        false, offset + 1 < n, values + (ulong(row) * n + offset) * DV, own_scratch, lane);
  }
}

// ---------------------------------------------------------------------------------------- splits

// Which tokens the rows of a request see, and how they are split. params: int [8].
struct Splits {
  int seq_len;       // tokens of the request, its Q query tokens included
  int first;         // first token that any row sees, rounded down to a multiple of 8
  int split_tokens;  // tokens of a split
  int num_splits;    // splits for which there is room
  int max_blocks;    // row length of the block table

  template <typename Params, typename Lengths>
  METAL_FUNC Splits(Params params, Lengths seq_lens, int request, int num_queries) {
    split_tokens = params[0];
    num_splits = params[1];
    max_blocks = params[3];
    seq_len = seq_lens[request];
    int window = params[2];  // 0: none
    int hidden = seq_len - num_queries + 1 - window;
    first = window > 0 && hidden > 0 ? hidden & ~7 : 0;
  }

  METAL_FUNC int used() const thread {
    return (seq_len - first + split_tokens - 1) / split_tokens;
  }
};

// ---------------------------------------------------------------------------------------- decode

// Half `i` of one or two words.
template <int WORDS>
METAL_FUNC float pick(const thread uint (&words)[WORDS], int i) {
  uint word = WORDS > 1 && i >= 2 ? words[WORDS - 1] : words[0];
  return float(as_type<half2>(i % 2 ? word >> 16 : word).x);
}

// Chunks of a run of neighbouring tokens, STRIDE bytes apart.
template <int STRIDE, int BITS, int PAIRS>
METAL_FUNC void load_run(thread Chunk<BITS> (&run)[PAIRS], const device uchar* codes) {
  UNROLL
  for (int p = 0; p < PAIRS; p++) {
    run[p].load(codes + 2 * p * STRIDE, codes + (2 * p + 1) * STRIDE);
  }
}

// Attention of R rows of one KV head over one split. A lane holds chunk l % LANES of TOKENS
// neighbouring tokens; each simdgroup reads SIMD_SIZE / LANES such runs at a time.
//   partials [B, splits, Q * Hq, Dv]  weighted sums of rotated values, relative to 2^max
//   states   [B, splits, Q * Hq, 2]   max and sum
template <typename Slots, int G, int Q, int R, int TOKENS, int SIMDGROUPS, bool SOFTCAP>
struct Decode {
  static constant constexpr int DK = Slots::key_head_size;
  static constant constexpr int DV = Slots::value_head_size;
  static constant constexpr int CHUNKS = Slots::longer / CHUNK;
  static constant constexpr int LANES =
      CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
  static constant constexpr int RUNS = SIMD_SIZE / LANES;
  static constant constexpr int STEP = RUNS * TOKENS;  // tokens of a simdgroup at a time
  static constant constexpr int PAIRS = TOKENS / 2;
  static constant constexpr int ROWS = R > 4 ? 8 : R > 2 ? 4 : R;  // R rounded up to a power of 2
  static constant constexpr int SCORES = TOKENS * ROWS;             // [row][token] of a run
  // Lanes that are added up as halves.
  static constant constexpr int NEIGHBOURS = SCORES > 2 && LANES > 1 ? 2 : 1;
  static constant constexpr int OWN = SCORES > LANES ? SCORES / LANES : 1;
  // Pairs of tokens among the own scores, whose scales the lane needs.
  static constant constexpr int OWN_PAIRS = OWN < TOKENS ? 1 : PAIRS;
  static constant constexpr int OWN_ROWS = OWN > TOKENS ? OWN / TOKENS : 1;
  static constant constexpr int SHARING = LANES > SCORES ? LANES / SCORES : 1;  // lanes of a score
  static constant constexpr int ROW_LANES = OWN < TOKENS ? SHARING * TOKENS / OWN : SHARING;
  static constant constexpr int QUERY_WORDS = R * LANES * 16;  // threadgroup uint
  static constant constexpr int RUN_WEIGHTS = (SCORES + 7) / 4 * 4;  // runs in different banks
  static constant constexpr int WEIGHTS = SIMDGROUPS * RUNS * RUN_WEIGHTS;
  static constant constexpr int SUMS = R * DV > WEIGHTS ? R * DV : WEIGHTS;
  static constant constexpr int SCRATCH = SUMS + 3 * R + 2 * SIMDGROUPS * R;  // ... and float

  // Rotates, scales and rounds the rows to half [R, 4, LANES, 4, 2]: the lanes of a run read each
  // quarter of their chunks side by side, and each number twice, for both tokens of a pair. What
  // the half cannot hold goes into row_scale.
  template <typename T>
  static METAL_FUNC void load_queries(
      const device T* queries, const device float* query_factors, const device float* centre,
      int kv_head, int tile, float scale, threadgroup uint* rows, threadgroup float* row_scale,
      threadgroup float* row_sum, threadgroup float* row_shift, int simdgroup, int lane) {
    for (int r = simdgroup; r < R; r += SIMDGROUPS) {
      int row = tile * R + r;
      bool real = row < G * Q;
      int head = kv_head * G + row % G;
      const device T* query = queries + (row / G * (Slots::num_kv_heads * G) + head) * DK;
      Vector<DK> q;
      float shift = 0.0f;
      UNROLL
      for (int block = 0; block < Vector<DK>::M; block++) {
        UNROLL
        for (int i = 0; i < Vector<DK>::W; i++) {
          int index = Vector<DK>::index(lane, block, i);
          float element = real && Vector<DK>::holds(lane) ? float(query[index]) : 0.0f;
          if (SOFTCAP && Vector<DK>::holds(lane)) {
            shift += element * centre[kv_head * DK + index];
          }
          q.x[block][i] =
              Vector<DK>::holds(lane) ? element * query_factors[kv_head * DK + index] : 0.0f;
        }
      }
      q.rotate(lane);
      float largest = 0.0f, total = 0.0f;
      UNROLL
      for (int block = 0; block < Vector<DK>::M; block++) {
        UNROLL
        for (int i = 0; i < Vector<DK>::W; i++) {
          largest = max(largest, abs(q.x[block][i]));
          total += q.x[block][i];
        }
      }
      largest = simd_max(largest);
      float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
      for (int i = lane; i < LANES * CHUNK; i += SIMD_SIZE) {
        rows[r * LANES * CHUNK + i] = 0;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL
      for (int block = 0; block < Vector<DK>::M; block++) {
        UNROLL
        for (int i = 0; i < Vector<DK>::W; i++) {
          if (Vector<DK>::holds(lane)) {
            int index = Vector<DK>::index(lane, block, i);
            int quarter = r * 4 + index % CHUNK / 4;
            half element = half(q.x[block][i] * inverse);
            rows[quarter * LANES * 4 + index / CHUNK * 4 + index % 4] =
                as_type<uint>(half2(element, element));
          }
        }
      }
      total = simd_sum(total);
      shift = simd_sum(shift);
      if (lane == 0) {
        row_scale[r] = largest * scale;
        row_sum[r] = total * scale;
        row_shift[r] = shift * scale;
      }
    }
  }

  template <typename T, typename Table, typename Lengths, typename Params, typename Scales>
  static METAL_FUNC void run(
      const device ushort* pages, const device T* queries, const device float* query_factors,
      const device float* centre, Table block_table, Lengths seq_lens,
      const device float* key_coefficients, const device float* value_coefficients, Params params,
      Scales scales, device float* partials, device float* states, threadgroup uint* query_words,
      threadgroup float* scratch, uint3 group, int simdgroup, int lane) {
    constexpr int TILES = (G * Q + R - 1) / R;
    int kv_head = int(group.x) / TILES, tile = int(group.x) % TILES;
    int split = group.y, request = group.z;
    const Splits splits(params, seq_lens, request, Q);
    int split_first = splits.first + split * splits.split_tokens;
    if (split_first >= splits.seq_len) {
      return;
    }
    int split_end = min(split_first + splits.split_tokens, splits.seq_len);
    int window = params[2];
    float softcap = scales[1];

    threadgroup float* sums = scratch;  // [R, Dv], after the last token
    threadgroup float* row_scale = scratch + SUMS;
    threadgroup float* row_sum = row_scale + R;
    threadgroup float* row_shift = row_sum + R;
    threadgroup float* group_max = row_shift + R;  // [SIMDGROUPS, R]
    threadgroup float* group_sum = group_max + SIMDGROUPS * R;

    // Rotate the queries, once for all tokens.
    const Codebook<Slots::key_bits, Slots::key_terms> key_codebook(key_coefficients);
    const Codebook<Slots::value_bits, Slots::value_terms> value_codebook(value_coefficients);
    float scale = SOFTCAP ? scales[0] / softcap : scales[0] * LOG2_E;
    load_queries(
        queries + ulong(request) * (Q * G * Slots::num_kv_heads * DK), query_factors, centre,
        kv_head, tile, scale, query_words, row_scale, row_sum, row_shift,
        simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The scores of a run of tokens are spread over its lanes: this lane owns OWN of them, of one
    // row or of OWN_ROWS whole rows.
    int chunk = lane % LANES, run = lane / LANES;
    int key_chunk = min(chunk, DK / CHUNK - 1), value_chunk = min(chunk, DV / CHUNK - 1);
    int own_first = chunk * SCORES / LANES;
    int own_row = own_first / TOKENS, own_token = own_first % TOKENS;
    int own_pair = own_token & ~1, own_place = own_token & 1;
    float own_scale[OWN_ROWS], own_sum[OWN_ROWS], own_shift[OWN_ROWS];
    int own_begin[OWN_ROWS], own_end[OWN_ROWS];
    SoftmaxState own[OWN_ROWS];
    UNROLL
    for (int i = 0; i < OWN_ROWS; i++) {
      int r = min(own_row + i, R - 1);
      own_scale[i] = row_scale[r] * key_codebook.unit;
      own_sum[i] = row_sum[r];
      own_shift[i] = row_shift[r];
      int query = (tile * R + r) / G;
      own_end[i] = splits.seq_len - Q + 1 + query;
      own_begin[i] = window > 0 ? own_end[i] - window : 0;
      own_end[i] = min(own_end[i], split_end);
    }
    float out[R * CHUNK];
    UNROLL
    for (int i = 0; i < R * CHUNK; i++) {
      out[i] = 0.0f;
    }

    // The keys of a run are read while the values of the run before are added up.
    threadgroup float* run_weights =  // [PAIRS, ROWS, 2]
        scratch + (simdgroup * RUNS + run) * RUN_WEIGHTS;
    const threadgroup uint* query_chunk = query_words + chunk * 4;
    int table_row = request * splits.max_blocks;
    int last_run = (split_end - 1) & ~(TOKENS - 1);
    int first = split_first + simdgroup * STEP;
    uint safe = min(first + run * TOKENS, last_run);
    const device uchar* page = Slots::head_page(
        pages, block_table[table_row + int(safe / Slots::block_size)], kv_head);
    Chunk<Slots::key_bits> key_codes[PAIRS];
    load_run<Slots::next_key>(
        key_codes, Slots::key_codes(page, safe % Slots::block_size, key_chunk));
    for (; first < split_end; first += SIMDGROUPS * STEP) {
      // Read the values and scales of the run; look up the page of the next.
      int token = first + run * TOKENS;
      uint slot = safe % Slots::block_size;
      Chunk<Slots::value_bits> value_codes[PAIRS];
      load_run<Slots::next_value>(value_codes, Slots::value_codes(page, slot, value_chunk));
      uint key_levels[PAIRS];
      if (Slots::key_has_levels) {
        load_words(Slots::key_levels(page, slot, key_chunk), key_levels);
      }
      uint key_scales[OWN_PAIRS], key_biases[OWN_PAIRS], value_scales[OWN_PAIRS];
      UNROLL
      for (int p = 0; p < OWN_PAIRS; p++) {
        uint pair = slot + own_pair + 2 * p;
        key_scales[p] = load_pair(Slots::key_scale(page, pair));
        key_biases[p] = Slots::key_has_bias ? load_pair(Slots::key_bias(page, pair)) : 0u;
        value_scales[p] = load_pair(Slots::value_scale(page, pair));
      }
      safe = min(token + SIMDGROUPS * STEP, last_run);
      int next_block = block_table[table_row + int(safe / Slots::block_size)];

      // Multiply this chunk of the keys with that of every row.
      half2 dots[R][PAIRS];
      UNROLL
      for (int r = 0; r < R; r++) {
        UNROLL
        for (int p = 0; p < PAIRS; p++) {
          dots[r][p] = half2(half(0.0f), half(0.0f));
        }
      }
      uint key_pairs[PAIRS][Slots::key_bits];
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        key_codes[p].pairs(key_pairs[p]);
      }
      UNROLL
      for (int part = 0; part < 4; part++) {
        half2 keys[PAIRS][4];
        UNROLL
        for (int p = 0; p < PAIRS; p++) {
          UNROLL
          for (int i = 0; i < 4; i++) {
            keys[p][i] =
                key_codebook.at(grid_point<Slots::key_bits>(key_pairs[p], part * 4 + i));
          }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
          uint4 words = *(const threadgroup uint4*)(query_chunk + (r * 4 + part) * LANES * 4);
          UNROLL
          for (int p = 0; p < PAIRS; p++) {
            dots[r][p] = fma(as_type<half2>(words.x), keys[p][0], dots[r][p]);
            dots[r][p] = fma(as_type<half2>(words.y), keys[p][1], dots[r][p]);
            dots[r][p] = fma(as_type<half2>(words.z), keys[p][2], dots[r][p]);
            dots[r][p] = fma(as_type<half2>(words.w), keys[p][3], dots[r][p]);
          }
        }
      }

      if (Slots::key_has_levels) {
        UNROLL
        for (int p = 0; p < PAIRS; p++) {
          half2 weights = level_weights(key_levels[p], key_chunk);
          UNROLL
          for (int r = 0; r < R; r++) {
            dots[r][p] = dots[r][p] * weights;
          }
        }
      }

      // Add up the chunks, two neighbours while they are halves; each lane keeps its own scores,
      // in powers of two.
      constexpr int LEFT = SCORES / NEIGHBOURS;
      float scores[LEFT];
      UNROLL
      for (int i = 0; i < LEFT; i += 2) {
        half2 dot = dots[min(i / TOKENS, R - 1)][i % TOKENS / 2];
        if (NEIGHBOURS == 2) {
          int other = i + LEFT;
          dot = fold_halves(
              dot, dots[min(other / TOKENS, R - 1)][other % TOKENS / 2], lane, LANES / 2);
        }
        scores[i] = float(dot.x);
        scores[i + 1] = float(dot.y);
      }
      fold<LEFT, LANES / NEIGHBOURS>(scores, lane, 1);
      bool visible[OWN];
      bool grows = false;
      UNROLL
      for (int i = 0; i < OWN; i++) {
        int row = i / TOKENS, which = own_token + i % TOKENS, place = own_place + i % TOKENS;
        scores[i] *= own_scale[row] * pick(key_scales, place);
        if (Slots::key_has_bias) {
          scores[i] += own_sum[row] * pick(key_biases, place);
        }
        if (SOFTCAP) {
          scores[i] = softcap * LOG2_E * precise::tanh(scores[i] + own_shift[row]);
        }
        visible[i] = token + which >= own_begin[row] && token + which < own_end[row];
        scores[i] = visible[i] ? scores[i] : -INFINITY;
        grows = grows || scores[i] > own[row].max + RESCALE_MARGIN;
      }

      // Move the maximum, but only when a score leaves its margin.
      if (simd_any(grows)) {
        float factors[ROWS];
        UNROLL
        for (int row = 0; row < OWN_ROWS; row++) {
          float largest = own[row].max;
          UNROLL
          for (int i = 0; i < OWN; i++) {
            largest = i / TOKENS == row ? max(largest, scores[i]) : largest;
          }
          UNROLL
          for (int mask = SHARING; mask < ROW_LANES; mask *= 2) {
            largest = max(largest, simd_shuffle_xor(largest, ushort(mask)));
          }
          factors[row] = own[row].rescale(largest);
        }
        spread<ROWS, LANES>(factors, lane);
        UNROLL
        for (int i = 0; i < R * CHUNK; i++) {
          out[i] *= factors[i / CHUNK];
        }
      }

      // Read the next keys. Not before the branch above: the compiler would hold them beside
      // those of this run, and wait for them to arrive where it copies them over.
      page = Slots::head_page(pages, next_block, kv_head);
      load_run<Slots::next_key>(
          key_codes, Slots::key_codes(page, safe % Slots::block_size, key_chunk));

      // Give every lane of the run all weights, value scales included.
      UNROLL
      for (int i = 0; i < OWN; i++) {
        float weight = own[i / TOKENS].update(scores[i]);
        float value_scale = pick(value_scales, own_place + i % TOKENS);
        if (chunk % SHARING == 0) {
          int which = own_token + i % TOKENS, row = own_row + i / TOKENS;
          run_weights[(which / 2 * ROWS + row) * 2 + which % 2] =
              visible[i] ? weight * value_scale : 0.0f;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);

      // Add this chunk of the values to every row.
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        uint value_pairs[Slots::value_bits];
        value_codes[p].pairs(value_pairs);
        float weights[2 * R];
        UNROLL
        for (int i = 0; i < 2 * R; i++) {
          weights[i] = run_weights[p * 2 * ROWS + i];
        }
        UNROLL
        for (int i = 0; i < CHUNK; i++) {
          half2 values = value_codebook.at(grid_point<Slots::value_bits>(value_pairs, i));
          float a = float(values.x), b = float(values.y);
          UNROLL
          for (int r = 0; r < R; r++) {
            out[r * CHUNK + i] = fma(weights[2 * r], a, out[r * CHUNK + i]);
            out[r * CHUNK + i] = fma(weights[2 * r + 1], b, out[r * CHUNK + i]);
          }
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    // Merge the runs of this simdgroup.
    float factors[ROWS];
    UNROLL
    for (int row = 0; row < OWN_ROWS; row++) {
      float largest = own[row].max;
      UNROLL
      for (int mask = LANES; mask < SIMD_SIZE; mask *= 2) {
        largest = max(largest, simd_shuffle_xor(largest, ushort(mask)));
      }
      factors[row] = own[row].rescale(largest);
      float sum = own[row].sum;
      UNROLL
      for (int mask = SHARING; mask < ROW_LANES; mask *= 2) {
        sum += simd_shuffle_xor(sum, ushort(mask));
      }
      UNROLL
      for (int mask = LANES; mask < SIMD_SIZE; mask *= 2) {
        sum += simd_shuffle_xor(sum, ushort(mask));
      }
      if (run == 0 && own_row + row < R) {
        group_max[simdgroup * R + own_row + row] = largest;
        group_sum[simdgroup * R + own_row + row] = sum;
      }
    }
    spread<ROWS, LANES>(factors, lane);
    UNROLL
    for (int i = 0; i < R * CHUNK; i++) {
      out[i] *= factors[i / CHUNK];
    }
    fold<R * CHUNK, RUNS>(out, lane, LANES);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Merge the simdgroups, one after the other.
    constexpr int HELD = R * CHUNK > RUNS ? R * CHUNK / RUNS : 1;
    int held_first = run * (R * CHUNK) / RUNS;
    for (int turn = 0; turn < SIMDGROUPS; turn++) {
      if (turn == simdgroup && chunk * CHUNK < DV) {
        UNROLL
        for (int i = 0; i < HELD; i++) {
          int r = (held_first + i) / CHUNK;
          int index = r * DV + chunk * CHUNK + (held_first + i) % CHUNK;
          float largest = group_max[r];
          for (int other = 1; other < SIMDGROUPS; other++) {
            largest = max(largest, group_max[other * R + r]);
          }
          float sum = out[i] * fast::exp2(group_max[simdgroup * R + r] - largest);
          sums[index] = turn == 0 ? sum : sums[index] + sum;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // Write sums and softmax state of the split.
    ulong split_index = ulong(request) * splits.num_splits + split;
    int thread_index = simdgroup * SIMD_SIZE + lane;
    for (int i = thread_index; i < R * DV; i += SIMDGROUPS * SIMD_SIZE) {
      int row = tile * R + i / DV;
      if (row < G * Q) {
        int out_row = row / G * (G * Slots::num_kv_heads) + kv_head * G + row % G;
        partials[(split_index * (G * Q * Slots::num_kv_heads) + out_row) * DV + i % DV] =
            sums[i] * value_codebook.unit;
      }
    }
    int row = tile * R + thread_index;
    if (thread_index < R && row < G * Q) {
      SoftmaxState total;
      for (int i = 0; i < SIMDGROUPS; i++) {
        total.max = max(total.max, group_max[i * R + thread_index]);
      }
      for (int i = 0; i < SIMDGROUPS; i++) {
        total.sum += group_sum[i * R + thread_index] *
            fast::exp2(group_max[i * R + thread_index] - total.max);
      }
      int out_row = row / G * (G * Slots::num_kv_heads) + kv_head * G + row % G;
      device float* state = states + (split_index * (G * Q * Slots::num_kv_heads) + out_row) * 2;
      state[0] = total.max;
      state[1] = total.sum;
    }
  }
};

// ----------------------------------------------------------------------------------------- merge

// The splits of one query row to its output [B, Q, Hq, Dv]: weigh, add, rotate back, cast.
template <
    typename Slots, int G, int Q, int SIMDGROUPS, bool SINKS, typename States, typename T,
    typename Lengths, typename Params, typename Scales, typename Sinks>
METAL_FUNC void merge_splits(
    const device float* partials, States states, const device T* queries,
    const device float* centre, const device float* value_factors, Lengths seq_lens, Sinks sinks,
    Params params, Scales scales, device T* output, threadgroup float* scratch, uint3 group,
    int simdgroup, int lane) {
  constexpr int DV = Slots::value_head_size;
  constexpr int DK = Slots::key_head_size;
  constexpr int HEADS = G * Slots::num_kv_heads;
  int row = group.x, request = group.y, head = row % HEADS;
  const Splits splits(params, seq_lens, request, Q);
  int used = splits.seq_len > 0 ? splits.used() : 0;
  ulong first = ulong(request) * splits.num_splits * (Q * HEADS) + row;

  // The sink is a logit without a value. Stored keys lack their centre, so it gives it up too.
  SoftmaxState total;
  if (SINKS) {
    float shift = 0.0f;
    const device T* query = queries + (ulong(request) * (Q * HEADS) + row) * DK;
    for (int i = lane; i < DK; i += SIMD_SIZE) {
      shift += float(query[i]) * centre[head / G * DK + i];
    }
    bool capped = scales[1] > 0.0f;
    shift = capped ? 0.0f : simd_sum(shift) * scales[0];
    total.max = (float(sinks[head]) - shift) * LOG2_E;
  }
  float sink = total.max;
  for (int split = lane; split < used; split += SIMD_SIZE) {
    total.max = max(total.max, states[(first + ulong(split) * (Q * HEADS)) * 2]);
  }
  total.max = simd_max(total.max);

  // Each simdgroup adds up its splits.
  Vector<DV> sum;
  UNROLL
  for (int block = 0; block < Vector<DV>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<DV>::W; i++) {
      sum.x[block][i] = 0.0f;
    }
  }
  for (int split = simdgroup; split < used; split += SIMDGROUPS) {
    ulong index = first + ulong(split) * (Q * HEADS);
    float factor = fast::exp2(states[index * 2] - total.max);
    total.sum += states[index * 2 + 1] * factor;
    UNROLL
    for (int block = 0; block < Vector<DV>::M; block++) {
      UNROLL
      for (int i = 0; i < Vector<DV>::W; i++) {
        if (Vector<DV>::holds(lane)) {
          sum.x[block][i] =
              fma(factor, partials[index * DV + Vector<DV>::index(lane, block, i)],
                  sum.x[block][i]);
        }
      }
    }
  }

  // Merge the simdgroups.
  constexpr int STRIDE = Vector<DV>::HELD + 1;
  UNROLL
  for (int block = 0; block < Vector<DV>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<DV>::W; i++) {
      scratch[simdgroup * STRIDE + (block * Vector<DV>::W + i) * SIMD_SIZE + lane] =
          sum.x[block][i];
    }
  }
  if (lane == 0) {
    scratch[simdgroup * STRIDE + STRIDE - 1] = total.sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0) {
    return;
  }
  for (int other = 1; other < SIMDGROUPS; other++) {
    UNROLL
    for (int block = 0; block < Vector<DV>::M; block++) {
      UNROLL
      for (int i = 0; i < Vector<DV>::W; i++) {
        sum.x[block][i] +=
            scratch[other * STRIDE + (block * Vector<DV>::W + i) * SIMD_SIZE + lane];
      }
    }
    total.sum += scratch[other * STRIDE + STRIDE - 1];
  }
  if (SINKS) {
    total.sum += fast::exp2(sink - total.max);
  }

  // Normalise, rotate back and cast.
  float normaliser = total.normaliser();
  sum.rotate(lane);
  UNROLL
  for (int block = 0; block < Vector<DV>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<DV>::W; i++) {
      if (Vector<DV>::holds(lane)) {
        int index = Vector<DV>::index(lane, block, i);
        output[(ulong(request) * (Q * HEADS) + row) * DV + index] =
            T(sum.x[block][i] * normaliser * value_factors[index]);
      }
    }
  }
}
