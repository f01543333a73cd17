// Sums over the lanes of a simdgroup, of many numbers at a time.
//
// Lane l of LANES neighbours, `stride` apart, ends with elements first .. first + N / LANES - 1 of
// the sum of their arrays v, first = l N / LANES; `spread` is the way back, without the sum. With
// fewer elements than lanes, neighbours share an element.
#pragma once

#include "paged/base.h"


// The row of a score among [row][token], or the last of R rows: R may be no power of 2. Without
// `min`, whose result the compiler does not know: an index that it knows keeps an array in
// registers.
template <int TOKENS, int R>
METAL_FUNC constexpr int row_of(int score) {
  return score / TOKENS < R ? score / TOKENS : R - 1;
}

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
          // Values, not elements: a choice between elements would keep v in memory.
          float low = v[i], high = v[i + n];
          float kept = upper ? high : low, sent = upper ? low : high;
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
