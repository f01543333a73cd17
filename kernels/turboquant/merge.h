// The splits of a query row to its output.
#pragma once

#include "turboquant/layout.h"
#include "turboquant/rotation.h"
#include "turboquant/softmax.h"
#include "turboquant/splits.h"

// One query row, in a simdgroup's share of the work: every SIMDGROUPS-th split is its own.
template <typename Layout, int G, int Q, int SIMDGROUPS>
struct Merge {
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int HEADS = G * Layout::num_kv_heads;
  static constant constexpr int ROWS = Q * HEADS;  // of a request
  static constant constexpr int M = Vector<DV>::M;
  static constant constexpr int W = Vector<DV>::W;
  static constant constexpr int STRIDE = Vector<DV>::HELD + 1;  // of a simdgroup in scratch
  static constant constexpr int SCRATCH = SIMDGROUPS * STRIDE;   // threadgroup floats

  // The sink of a head is a logit without a value. Stored keys lack their centre, so the sink gives
  // it up too, unless a soft-cap has put it back. In powers of two.
  template <typename T>
  static METAL_FUNC float sink_score(
      float sink, const device T* query, const device float* centre,
      const constant DecodeParameters& decode, int lane) {
    float shift = 0.0f;
    for (int i = lane; i < DK; i += SIMD_SIZE) {
      shift += float(query[i]) * centre[i];
    }
    shift = decode.softcap > 0.0f ? 0.0f : simd_sum(shift) * decode.scale;
    return (sink - shift) * LOG2_E;
  }

  // Adds up this simdgroup's splits of a row whose first split is row `first`, relative to
  // total.max.
  template <typename States>
  static METAL_FUNC void add_splits(
      thread Vector<DV>& sum, thread SoftmaxState& total, const device float* partials,
      States states, ulong first, int used, int simdgroup, int lane) {
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        sum.x[block][i] = 0.0f;
      }
    }
    for (int split = simdgroup; split < used; split += SIMDGROUPS) {
      ulong index = first + ulong(split) * ROWS;
      float factor = fast::exp2(states[index * 2] - total.max);
      total.sum += states[index * 2 + 1] * factor;
      UNROLL
      for (int block = 0; block < M; block++) {
        UNROLL
        for (int i = 0; i < W; i++) {
          if (Vector<DV>::holds(lane)) {
            float partial = partials[index * DV + Vector<DV>::index(lane, block, i)];
            sum.x[block][i] = fma(factor, partial, sum.x[block][i]);
          }
        }
      }
    }
  }

  // Adds up the simdgroups' shares; the first simdgroup has the result.
  static METAL_FUNC void add_simdgroups(
      thread Vector<DV>& sum, thread SoftmaxState& total, threadgroup float* scratch,
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

  // Normalises, rotates back and casts.
  template <typename T>
  static METAL_FUNC void write(
      thread Vector<DV>& sum, float normaliser, const device float* value_factors,
      device T* output, int lane) {
    sum.rotate(lane);
    UNROLL
    for (int block = 0; block < M; block++) {
      UNROLL
      for (int i = 0; i < W; i++) {
        if (Vector<DV>::holds(lane)) {
          int index = Vector<DV>::index(lane, block, i);
          output[index] = T(sum.x[block][i] * normaliser * value_factors[index]);
        }
      }
    }
  }
};

// The output [B, Q, Hq, Dv] of one query row of one request, from the partials and states that
// decode leaves.
template <
    typename Layout, int G, int Q, int SIMDGROUPS, bool SINKS, typename States, typename T,
    typename Lengths, typename Sinks>
METAL_FUNC void merge_splits(
    const device float* partials, States states, const device T* queries,
    const device float* centre, const device float* value_factors, Lengths seq_lens, Sinks sinks,
    const constant int* parameters, device T* output, threadgroup float* scratch, uint3 position,
    int simdgroup, int lane) {
  using Row = Merge<Layout, G, Q, SIMDGROUPS>;
  int row = position.x, request = position.y, head = row % Row::HEADS;
  const constant DecodeParameters& decode = parameters_in<DecodeParameters>(parameters);
  const int used = Splits(decode, seq_lens[request], Q).used();
  ulong output_row = ulong(request) * Row::ROWS + row;
  ulong first = ulong(request) * decode.num_splits * Row::ROWS + row;

  SoftmaxState total;
  if (SINKS) {
    total.max = Row::sink_score(
        float(sinks[head]), queries + output_row * Row::DK, centre + head / G * Row::DK, decode,
        lane);
  }
  float sink = total.max;
  for (int split = lane; split < used; split += SIMD_SIZE) {
    total.max = max(total.max, states[(first + ulong(split) * Row::ROWS) * 2]);
  }
  total.max = simd_max(total.max);

  Vector<Row::DV> sum;
  Row::add_splits(sum, total, partials, states, first, used, simdgroup, lane);
  Row::add_simdgroups(sum, total, scratch, simdgroup, lane);
  if (simdgroup > 0) {
    return;
  }
  if (SINKS) {
    total.sum += fast::exp2(sink - total.max);
  }
  Row::write(sum, total.normaliser(), value_factors, output + output_row * Row::DV, lane);
}
