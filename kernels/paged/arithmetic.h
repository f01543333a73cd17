// Operations whose rounding matters. A target may have its own, and then defines the macro.
#pragma once

#include "paged/base.h"

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

#ifndef BITS_OVER
// The bits of a word under a mask, over other bits.
METAL_FUNC uint bits_over(uint word, uint mask, uint other) { return (word & mask) | other; }
#endif

#ifndef BYTES_OVER
// The lower or the upper bytes of both halves of a word, under the exponent of 1024: 1024 + byte.
METAL_FUNC uint bytes_over(uint word, int upper) {
  return bits_over(upper ? word >> 8 : word, 0x00ff00ffu, 0x64006400u);
}
#endif

#ifndef ROUNDED_HALVES
METAL_FUNC half2 rounded_halves(float a, float b) { return half2(half(a), half(b)); }
#endif

// By its bits, which no optimisation of the compiler for finite numbers touches.
METAL_FUNC bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }
