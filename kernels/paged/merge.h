// The splits of a query row to its output.
#pragma once

#include "paged/softmax.h"
#include "paged/splits.h"

// What stored values become is known to an output alone (turboquant/output.h, dense/output.h),
// which is a type with these members:
//
//   Layout, Constants   head sizes and heads; the buffers of constants
//   Row                 a vector of Dv elements, spread over a simdgroup
//   sink_shift          what the scores of a query row lack
//   finish              a row of stored values to one of values, but for `factor` of each element
//
// One query row, in a simdgroup's share of the work: every SIMDGROUPS-th split is its own.
template <typename Output, int G, int Q, int SIMDGROUPS>
struct Merge {
  using Layout = typename Output::Layout;
  using Constants = typename Output::Constants;
  using Row = typename Output::Row;
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int HEADS = G * Layout::num_kv_heads;
  static constant constexpr int ROWS = Q * HEADS;  // of a request
  static constant constexpr int M = Row::M;
  static constant constexpr int W = Row::W;
  static constant constexpr int STRIDE = Row::HELD + 1;       // of a simdgroup in scratch
  static constant constexpr int SCRATCH = SIMDGROUPS * STRIDE;  // threadgroup floats

  // The sink of a head is a logit without a value, in powers of two. It gives up what the scores
  // lack, unless a soft-cap has put that back.
  template <typename T>
  static METAL_FUNC float sink_score(
      float sink, const device T* query, const thread Constants& constants, int kv_head,
      const constant DecodeParameters& decode, int lane) {
    float shift = Output::sink_shift(query, constants, kv_head, lane) * decode.scale;
    return (sink - (decode.softcap > 0.0f ? 0.0f : shift)) * LOG2_E;
  }

  // Adds up this simdgroup's splits of a row whose first split is row `first`, relative to
  // total.max.
  static METAL_FUNC void add_splits(
      thread Row& sum, thread SoftmaxState& total, const device float* partials,
      const device float* states, ulong first, int used, int simdgroup, int lane) {
    sum.fill(0.0f);
    for (int split = simdgroup; split < used; split += SIMDGROUPS) {
      ulong index = first + ulong(split) * ROWS;
      float factor = fast::exp2(states[index * 2] - total.max);
      total.sum += states[index * 2 + 1] * factor;
      UNROLL
      for (int block = 0; block < M; block++) {
        UNROLL
        for (int i = 0; i < W; i++) {
          if (Row::holds(lane, block)) {
            float partial = partials[index * DV + Row::index(lane, block, i)];
            sum.x[block][i] = fma(factor, partial, sum.x[block][i]);
          }
        }
      }
    }
  }

  // Adds up the simdgroups' shares; the first simdgroup has the result.
  static METAL_FUNC void add_simdgroups(
      thread Row& sum, thread SoftmaxState& total, threadgroup float* scratch,
      int simdgroup, int lane) {
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        scratch[simdgroup * STRIDE + (block * W + i) * SIMD_SIZE + lane] = sum.x[block][i];
      }
    }
    if (lane == 0) {
      scratch[simdgroup * STRIDE + STRIDE - 1] = total.sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup > 0) {
      return;
    }
    for (int other = 1; other < SIMDGROUPS; other++) {
      UNROLL
      for (int block = 0; block < M; block++) {
        UNROLL
        for (int i = 0; i < W; i++) {
          sum.x[block][i] += scratch[other * STRIDE + (block * W + i) * SIMD_SIZE + lane];
        }
      }
      total.sum += scratch[other * STRIDE + STRIDE - 1];
    }
  }

  // Normalises, makes values of stored values and casts.
  template <typename T>
  static METAL_FUNC void write(
      thread Row& sum, float normaliser, const thread Constants& constants, device T* output,
      int lane) {
    Output::finish(sum, lane);
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        if (Row::holds(lane, block)) {
          int index = Row::index(lane, block, i);
          output[index] = T(sum.x[block][i] * normaliser * Output::factor(constants, index));
        }
      }
    }
  }
};

// The output [B, Q, Hq, Dv] of one query row of one request, from the partials and states that
// decode leaves.
template <typename Output, int G, int Q, int SIMDGROUPS, bool SINKS, typename T>
METAL_FUNC void merge_splits(
    const device float* partials, const device float* states, const device T* queries,
    const device int* seq_lens, const device float* sinks,
    const thread typename Output::Constants& constants, const constant int* parameters,
    device T* output, threadgroup float* scratch, uint3 position, int simdgroup, int lane) {
  using Share = Merge<Output, G, Q, SIMDGROUPS>;
  int row = position.x, request = position.y, head = row % Share::HEADS;
  const constant DecodeParameters& decode = parameters_in<DecodeParameters>(parameters);
  const int used = Splits(decode, seq_lens[request], Q).used();
  ulong output_row = ulong(request) * Share::ROWS + row;
  ulong first = ulong(request) * decode.num_splits * Share::ROWS + row;

  SoftmaxState total;
  if (SINKS) {
    total.max = Share::sink_score(
        sinks[head], queries + output_row * Share::DK, constants, head / G, decode, lane);
  }
  float sink = total.max;
  for (int split = lane; split < used; split += SIMD_SIZE) {
    total.max = max(total.max, states[(first + ulong(split) * Share::ROWS) * 2]);
  }
  total.max = simd_max(total.max);

  typename Output::Row sum;
  Share::add_splits(sum, total, partials, states, first, used, simdgroup, lane);
  Share::add_simdgroups(sum, total, scratch, simdgroup, lane);
  if (simdgroup > 0) {
    return;
  }
  if (SINKS) {
    total.sum += fast::exp2(sink - total.max);
  }
  Share::write(sum, total.normaliser(), constants, output + output_row * Share::DV, lane);
}
