// Softmax over tokens that are seen a few at a time.
#pragma once

#include "paged/base.h"

constant constexpr float LOG2_E = 1.44269504088896341f;
constant constexpr float LOWEST_SCORE = -1e30f;  // running maximum before the first token
constant constexpr float RESCALE_MARGIN = 8.0f;  // in powers of two

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
