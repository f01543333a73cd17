// Codes and levels into pages, in the packing of bitpack.py. Whole halfwords are written, and
// nothing is read back.
#pragma once

#include "paged/base.h"
#include "turboquant/constants.h"

// Packs D codes of BITS bits, chunk by chunk.
template <int D, int BITS>
METAL_FUNC void pack_codes(const threadgroup uchar* codes, device ushort* target, int lane) {
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

// The halfword with the levels of chunks first .. first + 3 of COUNT, 4 bits each, first lowest.
template <int COUNT>
METAL_FUNC ushort packed_levels(const threadgroup uchar* levels, int first) {
  uint halfword = 0;
  UNROLL
  for (int i = 0; i < 4; i++) {
    halfword |= first + i < COUNT ? uint(levels[first + i]) << (i * 4) : 0u;
  }
  return ushort(halfword);
}
