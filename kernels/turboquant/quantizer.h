// A rotated vector to codes and a scale, as quantizer.py has it: same operations, same rounding.
#pragma once

#include "turboquant/rotation.h"

// How many of width, 2 width, ... last width, each rounded, are at most the magnitude; a whole
// number. `inverse` is 1 / width, roughly, so that the first guess is off by one at most.
METAL_FUNC float multiples(float magnitude, float width, float inverse, int last) {
  float count = min(floor(magnitude * inverse), float(last));
  count -= magnitude < rounded_product(count, width) ? 1.0f : 0.0f;
  count += magnitude >= rounded_product(count + 1.0f, width) ? 1.0f : 0.0f;
  return magnitude >= rounded_product(float(last), width) ? float(last) : count;
}

// Rotated coordinates beyond the limit are cut.
METAL_FUNC float limited(float y) { return min(max(y, -COORDINATE_LIMIT), COORDINATE_LIMIT); }

// The code of a coordinate whose magnitude is `steps` bounds away from zero.
template <int BITS>
METAL_FUNC uchar signed_code(float y, int steps) {
  constexpr int HALF = 1 << (BITS - 1);
  return uchar(y >= 0.0f ? HALF + steps : HALF - 1 - steps);
}

// A scale that is tried, and how the centroids c that it chooses lie to the vector y.
struct Candidate {
  float scale;
  float along;   // <y, c>
  float energy;  // <c, c>
  float ratio;   // along^2 / energy: the larger, the closer the direction of c to that of y

  METAL_FUNC Candidate() : scale(0.0f), along(0.0f), energy(1.0f), ratio(-1.0f) {}

  METAL_FUNC Candidate(float scale, float along, float energy)
      : scale(scale), along(along), energy(energy), ratio(rounded_product(along, along) / energy) {}

  // The scale with the least squared error.
  METAL_FUNC float least_squares() const thread { return along / energy; }

  // The scale under which the error is at right angles to y, given <y, y>.
  METAL_FUNC float unbiased(float square) const thread {
    return square / (along > 0.0f ? along : 1.0f);
  }
};

template <int D, int BITS, int TERMS, bool HAS_BIAS, bool UNBIASED>
struct Quantizer {
  static constant constexpr int HALF = 1 << (BITS - 1);
  static constant constexpr int M = Vector<D>::M;
  static constant constexpr int W = Vector<D>::W;

  // Writes the codes to threadgroup memory. y changes.
  static METAL_FUNC void quantize(
      thread Vector<D>& y, const device float* codebook, threadgroup uchar* codes,
      thread half& scale, thread half& bias, int lane) {
    const bool holds = Vector<D>::holds(lane);
    float largest = limit_and_centre(y, bias, holds);
    float square = UNBIASED ? energy_of(y) : 0.0f;
    Candidate best;
    for (int i = 0; i < NUM_CANDIDATES; i++) {
      float trial = rounded_product(largest, codebook[CODEBOOK_FACTORS + i]);
      Candidate tried = try_scale(y, codebook, trial, holds);
      if (tried.ratio > best.ratio) {
        best = tried;
      }
    }
    scale = half(min(UNBIASED ? best.unbiased(square) : best.least_squares(), MAX_SCALE));
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        int count = steps(codebook, abs(y.x[block][i]), best.scale);
        if (holds) {
          codes[Vector<D>::index(lane, block, i)] = signed_code<BITS>(y.x[block][i], count);
        }
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

 private:
  // Limits y, subtracts its middle where there is a bias; returns the largest magnitude left.
  static METAL_FUNC float limit_and_centre(thread Vector<D>& y, thread half& bias, bool holds) {
    float low = INFINITY, high = -INFINITY;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        y.x[block][i] = limited(y.x[block][i]);
        low = holds ? min(low, y.x[block][i]) : low;
        high = holds ? max(high, y.x[block][i]) : high;
      }
    }
    low = -simd_max(-low);
    high = simd_max(high);
    if (HAS_BIAS) {
      bias = half(min(max(rounded_product(high + low, 0.5f), -MAX_SCALE), MAX_SCALE));
      low -= float(bias);
      high -= float(bias);
      UNROLL
      for (int block = 0; block < M; block++) {
        UNROLL
        for (int i = 0; i < W; i++) {
          y.x[block][i] -= holds ? float(bias) : 0.0f;
        }
      }
    }
    return max(-low, high);
  }

  // <y, y>
  static METAL_FUNC float energy_of(const thread Vector<D>& y) {
    Vector<D> squares;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        squares.x[block][i] = rounded_product(y.x[block][i], y.x[block][i]);
      }
    }
    return squares.tree_sum();
  }

  static METAL_FUNC Candidate try_scale(
      const thread Vector<D>& y, const device float* codebook, float scale, bool holds) {
    Vector<D> terms, squares;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        float magnitude = abs(y.x[block][i]);
        float c = holds ? centroid(codebook, steps(codebook, magnitude, scale)) : 0.0f;
        terms.x[block][i] = rounded_product(magnitude, c);
        squares.x[block][i] = rounded_product(c, c);
      }
    }
    return Candidate(scale, terms.tree_sum(), squares.tree_sum());
  }

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

  // The magnitude of the centroid that many steps from zero.
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
};
