// How a split of decode ends: with a partial result for merge, or with the output where a request
// has one split.
#pragma once

#include "paged/merge.h"
#include "paged/queries.h"

// The maxima and sums [SIMDGROUPS, ROWS] of a threadgroup's softmax states, in threadgroup memory.
template <int SIMDGROUPS, int ROWS>
struct SimdgroupStates {
  const threadgroup float* maxima;
  const threadgroup float* sums;

  METAL_FUNC float largest(int row) const thread {
    float largest = maxima[row];
    for (int i = 1; i < SIMDGROUPS; i++) {
      largest = max(largest, maxima[i * ROWS + row]);
    }
    return largest;
  }

  METAL_FUNC SoftmaxState total(int row) const thread {
    SoftmaxState total;
    total.max = largest(row);
    for (int i = 0; i < SIMDGROUPS; i++) {
      total.sum += sums[i * ROWS + row] * fast::exp2(maxima[i * ROWS + row] - total.max);
    }
    return total;
  }
};

// What a launch of decode writes to.
template <typename T>
struct SplitOutputs {
  device float* partials;  // [B, splits, Q * Hq, Dv], relative to 2^max; nothing with one split
  device float* states;    // [B, splits, Q * Hq, 2], max and sum; nothing with one split
  device T* output;        // [B, Q, Hq, Dv]; nothing with several splits
};

template <typename Output, int G, int Q, int R, int SIMDGROUPS, bool SINKS>
struct SplitEnd {
  using Layout = typename Output::Layout;
  using Share = Merge<Output, G, Q, SIMDGROUPS>;
  using Row = typename Output::Row;
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int HEADS = G * Layout::num_kv_heads;
  static constant constexpr int ROWS = Q * HEADS;  // of a request

  // Row r of a tile, among those of its request; below 0 past the last.
  static METAL_FUNC int request_row(QueryTile which, int r) {
    int row = which.tile * R + r;
    return row < G * Q ? row / G * HEADS + which.kv_head * G + row % G : -1;
  }

  // `sums.at(r, i)` is element i of row r in threadgroup memory, relative to 2^states.largest(r);
  // `queries` and `seq_len` are the request's. A threadgroup barrier lies before.
  template <typename Sums, typename States, typename T>
  static METAL_FUNC void write(
      const thread Sums& sums, const thread States& states, const device T* queries,
      const device float* sinks, const thread typename Output::Constants& constants,
      const constant DecodeParameters& decode, SplitOutputs<T> outputs, QueryTile which,
      int split, int request, int simdgroup, int lane) {
    if (decode.num_splits > 1) {
      write_partials(sums, states, decode, outputs, which, split, request, simdgroup, lane);
      return;
    }
    for (int r = simdgroup; r < R; r += SIMDGROUPS) {
      int row = request_row(which, r);
      if (row < 0) {
        break;
      }
      SoftmaxState total = states.total(r);
      float before = total.max;
      if (SINKS) {
        float sink = Share::sink_score(
            sinks[row % HEADS], queries + row * DK, constants, which.kv_head, decode, lane);
        total.rescale(max(total.max, sink));
        total.sum += fast::exp2(sink - total.max);
      }
      Row values;
      values.fill(0.0f);
      UNROLL
      for (int block = 0; block < Row::M; block++) {
        UNROLL
        for (int i = 0; i < Row::W; i++) {
          if (Row::holds(lane, block)) {
            values.x[block][i] = sums.at(r, Row::index(lane, block, i));
          }
        }
      }
      float normaliser = total.normaliser() * fast::exp2(before - total.max);
      device T* output = outputs.output + (ulong(request) * ROWS + row) * DV;
      Share::write(values, normaliser, constants, output, lane);
    }
  }

  // Zeros, for a request without tokens, unless merge writes them.
  template <typename T>
  static METAL_FUNC void write_nothing(
      const constant DecodeParameters& decode, SplitOutputs<T> outputs, QueryTile which,
      int request, int simdgroup, int lane) {
    for (int r = simdgroup; r < R && decode.num_splits == 1; r += SIMDGROUPS) {
      int row = request_row(which, r);
      for (int i = lane; i < DV && row >= 0; i += SIMD_SIZE) {
        outputs.output[(ulong(request) * ROWS + row) * DV + i] = T(0.0f);
      }
    }
  }

 private:
  template <typename Sums, typename States, typename T>
  static METAL_FUNC void write_partials(
      const thread Sums& sums, const thread States& states,
      const constant DecodeParameters& decode, SplitOutputs<T> outputs, QueryTile which,
      int split, int request, int simdgroup, int lane) {
    ulong first = (ulong(request) * decode.num_splits + split) * ROWS;
    int thread_index = simdgroup * SIMD_SIZE + lane;
    for (int i = thread_index; i < R * DV; i += SIMDGROUPS * SIMD_SIZE) {
      int row = request_row(which, i / DV);
      if (row >= 0) {
        outputs.partials[(first + row) * DV + i % DV] = sums.at(i / DV, i % DV);
      }
    }
    if (thread_index < R) {
      int row = request_row(which, thread_index);
      if (row >= 0) {
        SoftmaxState total = states.total(thread_index);
        outputs.states[(first + row) * 2] = total.max;
        outputs.states[(first + row) * 2 + 1] = total.sum;
      }
    }
  }
};
