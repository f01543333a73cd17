// What merge makes of sums of compressed values: see paged/merge.h for what an output is.
#pragma once

#include "paged/merge.h"
#include "turboquant/layout.h"
#include "turboquant/rotation.h"

template <typename PageLayout>
struct RotatedOutput {
  using Layout = PageLayout;
  using Row = Vector<Layout::value_head_size>;

  struct Constants {
    const device float* centre;
    const device float* value_factors;
  };

  // Stored keys lack their centre: its product with the query.
  template <typename T>
  static METAL_FUNC float sink_shift(
      const device T* query, const thread Constants& constants, int kv_head, int lane) {
    const device float* centre = constants.centre + kv_head * Layout::key_head_size;
    float shift = 0.0f;
    for (int i = lane; i < Layout::key_head_size; i += SIMD_SIZE) {
      shift += float(query[i]) * centre[i];
    }
    return simd_sum(shift);
  }

  static METAL_FUNC void finish(thread Row& sum, int lane) { sum.rotate(lane); }

  static METAL_FUNC float factor(const thread Constants& constants, int index) {
    return constants.value_factors[index];
  }
};
