// The rotation of a vector that a simdgroup holds, and sums over its elements, as rotation.py
// defines them: operation by operation, each rounded on its own.
#pragma once

#include "paged/arithmetic.h"
#include "turboquant/constants.h"

// A vector of D = M * 2^k elements, spread over a simdgroup: lane l holds elements l W .. l W + W-1
// of each of the M blocks of 2^k. Lanes past the end of a short block hold zeros.
template <int D>
struct Vector {
  static constant constexpr int POWER = D & -D;
  static constant constexpr int M = D / POWER;
  static constant constexpr int W = POWER > SIMD_SIZE ? POWER / SIMD_SIZE : 1;
  static constant constexpr int HELD = M * W * SIMD_SIZE;  // by all lanes, zeros included
  float x[M][W];

  static_assert(POWER >= MIN_POWER && M <= MAX_ODD_FACTOR && D <= MAX_HEAD_SIZE, "head size");

  // Whether a lane holds elements, of any block.
  static METAL_FUNC bool holds(int lane, int = 0) { return lane * W < POWER; }

  static METAL_FUNC int index(int lane, int block, int i) {
    return block * POWER + lane * W + i;
  }

  METAL_FUNC void fill(float value) thread {
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        x[block][i] = value;
      }
    }
  }

  // Whether no element is NaN or infinite; the same in every lane.
  METAL_FUNC bool all_finite() const thread {
    bool broken = false;
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        broken = broken || !is_finite(x[block][i]);
      }
    }
    return !simd_any(broken);
  }

  // R x, which is its own inverse.
  METAL_FUNC void rotate(int lane) thread {
    UNROLL
    for (int block = 0; block < M; block++) {
      hadamard(x[block], lane);
    }
    if (M > 1) {
      mix_blocks();
    }
  }

  // Sum of all elements in the order of rotation.tree_sum; the same in every lane.
  METAL_FUNC float tree_sum() const thread {
    float sums[M];
    lane_sums<SIMD_SIZE>(sums);
    float total = sums[0];
    UNROLL
    for (int block = 1; block < M; block++) {
      total += sums[block];
    }
    return total;
  }

  // For each block, the sum of the elements that this lane and its LANES - 1 neighbours hold:
  // neighbours are added in pairs, then pairs of pairs.
  template <int LANES>
  METAL_FUNC void lane_sums(thread float (&sums)[M]) const thread {
    UNROLL
    for (int block = 0; block < M; block++) {
      float held[W];
      UNROLL
      for (int i = 0; i < W; i++) {
        held[i] = x[block][i];
      }
      UNROLL
      for (int distance = 1; distance < W; distance *= 2) {
        UNROLL
        for (int i = 0; i < W; i += 2 * distance) {
          held[i] += held[i + distance];
        }
      }
      UNROLL
      for (int distance = 1; distance < LANES; distance *= 2) {
        held[0] += simd_shuffle_xor(held[0], ushort(distance));
      }
      sums[block] = held[0];
    }
  }

 private:
  // H / sqrt(2^k) of one block: butterflies within a lane, then between lanes.
  static METAL_FUNC void hadamard(thread float (&block)[W], int lane) {
    constexpr bool SQUARE = POWER == 16 || POWER == 64 || POWER == 256;
    constexpr float SCALE = (SQUARE ? 1.0f : 0.70710678118654752f) /
        (POWER >= 256 ? 16.0f : POWER >= 64 ? 8.0f : 4.0f);
    UNROLL
    for (int distance = 1; distance < W; distance *= 2) {
      UNROLL
      for (int i = 0; i < W; i++) {
        if ((i & distance) == 0) {
          float a = block[i], b = block[i + distance];
          block[i] = a + b;
          block[i + distance] = a - b;
        }
      }
    }
    UNROLL
    for (int distance = 1; distance < POWER / W; distance *= 2) {
      UNROLL
      for (int i = 0; i < W; i++) {
        float other = simd_shuffle_xor(block[i], ushort(distance));
        block[i] = (lane & distance) ? other - block[i] : block[i] + other;
      }
    }
    UNROLL
    for (int i = 0; i < W; i++) {
      block[i] = rounded_product(block[i], SCALE);
    }
  }

  // Subtracts from each block 2 / M times the sum of the blocks.
  METAL_FUNC void mix_blocks() thread {
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
};
