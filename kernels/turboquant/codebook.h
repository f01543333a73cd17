// What codes stand for, as formats.py has it.
#pragma once

#include "paged/arithmetic.h"
#include "turboquant/constants.h"

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

// What multiplies the centroids of chunk `chunk` of both tokens, from their levels; exact.
METAL_FUNC half2 level_weights(uint levels, uint chunk) {
  constexpr float OFFSET = (float(LEVEL_BASE) - 1024.0f) * LEVEL_UNIT;
  uint word = bits_over(levels >> (chunk % 4 * 4), 0x000f000fu, 0x64006400u);
  half unit = half(LEVEL_UNIT), offset = half(OFFSET);
  return fma(as_type<half2>(word), half2(unit, unit), half2(offset, offset));
}
