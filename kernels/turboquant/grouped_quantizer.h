// A rotated key to codes, levels and a scale, as grouped_quantizer.py has it.
#pragma once

#include "turboquant/quantizer.h"

static_assert(GROUP_SIZE == CHUNK, "the coordinates that share a level are a chunk of codes");

template <int D, int BITS>
struct GroupedQuantizer {
  static constant constexpr int HALF = 1 << (BITS - 1);
  static constant constexpr int M = Vector<D>::M;
  static constant constexpr int W = Vector<D>::W;
  static constant constexpr int GROUP_LANES = GROUP_SIZE / W;  // that hold one group of a block

  // Writes codes and levels to threadgroup memory. y changes.
  static METAL_FUNC void quantize(
      thread Vector<D>& y, const device float* codebook, threadgroup uchar* codes,
      threadgroup uchar* levels, thread half& scale, int lane) {
    const bool holds = Vector<D>::holds(lane);
    const float step = codebook[0];
    float reach[M];
    float largest = limit(y, reach);
    Candidate best;
    int best_level[M];
    UNROLL
    for (int block = 0; block < M; block++) {
      best_level[block] = 0;
    }
    UNROLL
    for (int i = 0; i < NUM_CANDIDATES; i++) {
      float trial = rounded_product(largest, codebook[CODEBOOK_FACTORS + i]);
      const Choice choice = choose_levels(y, reach, trial, step, holds);
      const Candidate tried(trial, choice.terms.tree_sum(), choice.squares.tree_sum());
      if (tried.ratio > best.ratio) {
        best = tried;
        UNROLL
        for (int block = 0; block < M; block++) {
          best_level[block] = choice.level[block];
        }
      }
    }
    scale = half(min(best.least_squares(), MAX_SCALE));
    write(y, best.scale, best_level, step, codes, levels, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

 private:
  // A level for the group of this lane in each block, and what it makes of the elements.
  struct Choice {
    int level[M];
    float gain[M];      // 2 <y, c> - scale <c, c>: what the level takes off the group's error
    Vector<D> terms;    // |y| c
    Vector<D> squares;  // c c
  };

  // Limits y; returns its largest magnitude, and in `reach` that of each group.
  static METAL_FUNC float limit(thread Vector<D>& y, thread float (&reach)[M]) {
    float largest = 0.0f;
    UNROLL
    for (int block = 0; block < M; block++) {
      reach[block] = 0.0f;
      UNROLL
      for (int i = 0; i < W; i++) {
        y.x[block][i] = limited(y.x[block][i]);
        reach[block] = max(reach[block], abs(y.x[block][i]));
      }
      UNROLL
      for (int distance = 1; distance < GROUP_LANES; distance *= 2) {
        reach[block] = max(reach[block], simd_shuffle_xor(reach[block], ushort(distance)));
      }
      largest = max(largest, reach[block]);
    }
    return simd_max(largest);
  }

  // Each group tries a few levels under one scale and takes the one with the least error, the
  // first among equals.
  static METAL_FUNC Choice choose_levels(
      const thread Vector<D>& y, const thread float (&reach)[M], float scale, float step,
      bool holds) {
    Choice best;
    UNROLL
    for (int which = 0; which < TRIED_LEVELS; which++) {
      Choice tried;
      UNROLL
      for (int block = 0; block < M; block++) {
        tried.level[block] = lowest_level(reach[block], scale) + which;
      }
      try_levels(tried, y, scale, step, holds);
      UNROLL
      for (int block = 0; block < M; block++) {
        bool better = which == 0 || tried.gain[block] > best.gain[block];
        best.level[block] = better ? tried.level[block] : best.level[block];
        best.gain[block] = better ? tried.gain[block] : best.gain[block];
        UNROLL
        for (int i = 0; i < W; i++) {
          float term = tried.terms.x[block][i], square = tried.squares.x[block][i];
          best.terms.x[block][i] = better ? term : best.terms.x[block][i];
          best.squares.x[block][i] = better ? square : best.squares.x[block][i];
        }
      }
    }
    return best;
  }

  // Completes a choice whose levels are given.
  static METAL_FUNC void try_levels(
      thread Choice& tried, const thread Vector<D>& y, float scale, float step, bool holds) {
    UNROLL
    for (int block = 0; block < M; block++) {
      float cell = cell_width(tried.level[block], step);
      float width = rounded_product(scale, cell), inverse = rough_inverse(width);
      UNROLL
      for (int i = 0; i < W; i++) {
        float magnitude = abs(y.x[block][i]);
        float c = (multiples(magnitude, width, inverse, HALF - 1) + 0.5f) * cell;
        c = holds ? c : 0.0f;
        tried.terms.x[block][i] = rounded_product(magnitude, c);
        tried.squares.x[block][i] = rounded_product(c, c);
      }
    }
    float along[M], energy[M];
    tried.terms.template lane_sums<GROUP_LANES>(along);
    tried.squares.template lane_sums<GROUP_LANES>(energy);
    UNROLL
    for (int block = 0; block < M; block++) {
      tried.gain[block] = 2.0f * along[block] - rounded_product(scale, energy[block]);
    }
  }

  // The lowest level whose grid reaches the group's largest magnitude, or one from which all that
  // are tried exist.
  static METAL_FUNC int lowest_level(float reach, float scale) {
    float unit = rounded_product(scale, 4.0f * LEVEL_UNIT);
    int filled = int(multiples(reach, unit, rough_inverse(unit), LEVEL_BASE + NUM_LEVELS - 1));
    return min(max(filled + 1 - LEVEL_BASE, 0), NUM_LEVELS - TRIED_LEVELS);
  }

  // Weight of a level times the width of a cell without it; exact.
  static METAL_FUNC float cell_width(int level, float step) {
    return float(LEVEL_BASE + level) * LEVEL_UNIT * step;
  }

  static METAL_FUNC void write(
      const thread Vector<D>& y, float scale, const thread int (&level)[M], float step,
      threadgroup uchar* codes, threadgroup uchar* levels, int lane) {
    UNROLL
    for (int block = 0; block < M; block++) {
      float width = rounded_product(scale, cell_width(level[block], step));
      float inverse = rough_inverse(width);
      UNROLL
      for (int i = 0; i < W; i++) {
        int count = int(multiples(abs(y.x[block][i]), width, inverse, HALF - 1));
        int index = Vector<D>::index(lane, block, i);
        if (Vector<D>::holds(lane)) {
          codes[index] = signed_code<BITS>(y.x[block][i], count);
          if (index % GROUP_SIZE == 0) {
            levels[index / GROUP_SIZE] = uchar(level[block]);
          }
        }
      }
    }
  }
};
