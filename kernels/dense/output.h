// What merge makes of sums of dense values, which is what they are: see paged/merge.h for what an
// output is.
#pragma once

#include "dense/layout.h"
#include "paged/merge.h"

// A vector of D elements, spread over a simdgroup: neighbouring lanes hold neighbouring elements.
template <int D>
struct DenseRow {
  static constant constexpr int M = (D + SIMD_SIZE - 1) / SIMD_SIZE;
  static constant constexpr int W = 1;
  static constant constexpr int HELD = M * SIMD_SIZE;  // by all lanes, those past the end included
  float x[M][W];

  static METAL_FUNC int index(int lane, int block, int) { return block * SIMD_SIZE + lane; }

  static METAL_FUNC bool holds(int lane, int block) { return index(lane, block, 0) < D; }

  METAL_FUNC void fill(float value) thread {
    UNROLL
    for (int block = 0; block < M; block++) {
      x[block][0] = value;
    }
  }
};

template <typename DenseLayout>
struct DenseOutput {
  using Layout = DenseLayout;
  using Row = DenseRow<Layout::value_head_size>;

  struct Constants {};

  // Scores lack nothing.
  template <typename T>
  static METAL_FUNC float sink_shift(const device T*, const thread Constants&, int, int) {
    return 0.0f;
  }

  static METAL_FUNC void finish(thread Row&, int) {}

  static METAL_FUNC float factor(const thread Constants&, int) { return 1.0f; }
};
