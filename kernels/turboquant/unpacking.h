// Codes out of pages, in the packing of bitpack.py.
//
// Two neighbouring tokens ride in the two halves of each word: pairs[j] holds halfword j of a chunk
// of token A below halfword j of the same chunk of token B.
#pragma once

#include "paged/arithmetic.h"
#include "turboquant/constants.h"

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

// The piece of code `rest` (of those in spare bits) that halfword j of both tokens holds, in both
// halves, as a part of the code that begins at bit 1. With 3 bits, the one code in spare bits has
// its bit j in bit 15 of halfword j: it goes to bit 1 + j.
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

// The fields from bit `position` of both halves of a word as (2 code - (n - 1)) / n, n = 2^BITS:
// points of a grid in (-1, 1). A field placed at bits 1..10 under the exponent of 1024 is a half,
// without shift or conversion; every step is exact.
template <int BITS>
METAL_FUNC half2 field_point(uint word, int position) {
  constexpr int HIGH_SHIFT = BITS == 6 ? 4 : (BITS == 4 || BITS == 8) ? 7 : 8;
  constexpr uint MASK = (1u << BITS) - 1;
  if (position == 0) {
    word += word;
    position = 1;
  } else if (position + BITS > 10) {
    word >>= HIGH_SHIFT;
    position -= HIGH_SHIFT;
  }
  float step = 1.0f / float((1 << BITS) << (position - 1));
  half scale = half(step);
  half offset = half(-1024.0f * step - float((1 << BITS) - 1) / float(1 << BITS));
  uint placed = bits_over(word, (MASK << position) * 0x10001u, 0x64006400u);
  return fma(as_type<half2>(placed), half2(scale, scale), half2(offset, offset));
}

// Code i of both tokens as such a point.
template <int BITS>
METAL_FUNC half2 grid_point(const thread uint (&pairs)[BITS], int i) {
  constexpr int FIELDS = 16 / BITS;
  if (i < BITS * FIELDS) {
    return field_point<BITS>(pairs[i / FIELDS], i % FIELDS * BITS);
  }
  uint word = 0;
  UNROLL
  for (int j = 0; j < BITS; j++) {
    word |= spare_piece<BITS>(pairs[j], j, i - BITS * FIELDS);
  }
  return field_point<BITS>(word, 1);
}
