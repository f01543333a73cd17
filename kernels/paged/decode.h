// Attention of query rows over one split of a request's tokens, straight from its pages.
#pragma once

#include "paged/lanes.h"
#include "paged/queries.h"
#include "paged/softmax.h"
#include "paged/split_end.h"
#include "paged/splits.h"

// What a page holds is known to a reader of pages alone (turboquant/reader.h, dense/reader.h), which
// is a type with these members:
//
//   Layout, LANE_ELEMENTS  where things are; how many elements of a vector a lane holds
//   PREPARED               threadgroup uint4 that a lane's part of a query row takes
//   MAY_LEAK               whether a value that no query sees may be no number
//   Query, Constants       what a query element becomes; the buffers of constants, which the
//                          constructor takes
//   load_queries           the rows of a threadgroup, made ready
//   Keys, Values, Scales   this lane's part of a run of tokens as it lies in memory: loading does
//                          not wait, using does
//   multiply               the products of a run's keys with every row, part by part of the lanes
//   Pair                   the values of two neighbouring tokens, ready to be taken
//   key_unit, value_unit   factors that products and values lack
//
// Attention of R rows of one KV head over one split. A lane holds chunk l % LANES of TOKENS
// neighbouring tokens, which are a run; each simdgroup reads RUNS of them at a time.
// What they come to goes where split_end.h has it; `Output` is that of merge.h.
template <
    typename Reader, typename Output, int G, int Q, int R, int TOKENS, int SIMDGROUPS,
    bool SOFTCAP, bool SINKS>
struct Decode {
  using Layout = typename Reader::Layout;
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int CHUNK = Reader::LANE_ELEMENTS;
  static constant constexpr int KEY_CHUNKS = (DK + CHUNK - 1) / CHUNK;
  static constant constexpr int VALUE_CHUNKS = (DV + CHUNK - 1) / CHUNK;
  static constant constexpr int CHUNKS = KEY_CHUNKS > VALUE_CHUNKS ? KEY_CHUNKS : VALUE_CHUNKS;
  // Lanes of a run. At least so many that the runs share the sums of a lane evenly, for any R.
  static constant constexpr int LEAST_LANES = SIMD_SIZE / CHUNK;
  static constant constexpr int VECTOR_LANES =
      CHUNKS > 16 ? 32 : CHUNKS > 8 ? 16 : CHUNKS > 4 ? 8 : CHUNKS > 2 ? 4 : CHUNKS;
  static constant constexpr int LANES = VECTOR_LANES > LEAST_LANES ? VECTOR_LANES : LEAST_LANES;
  static constant constexpr int RUNS = SIMD_SIZE / LANES;
  static constant constexpr int STEP = RUNS * TOKENS;  // tokens of a simdgroup at a time
  static constant constexpr int PAIRS = TOKENS / 2;
  static constant constexpr int ROWS = R > 4 ? 8 : R > 2 ? 4 : R;  // R rounded up to a power of 2
  static constant constexpr int SCORES = TOKENS * ROWS;             // [row][token] of a run
  static constant constexpr int ADDED = Reader::added(SCORES, LANES);  // lanes, by the reader
  static constant constexpr int LEFT = SCORES / ADDED;                // scores of a lane from there
  static constant constexpr int OWN = SCORES > LANES ? SCORES / LANES : 1;
  // Pairs of tokens among the own scores, whose scales the lane needs.
  static constant constexpr int OWN_PAIRS = OWN < TOKENS ? 1 : PAIRS;
  static constant constexpr int OWN_ROWS = OWN > TOKENS ? OWN / TOKENS : 1;
  static constant constexpr int SHARING = LANES > SCORES ? LANES / SCORES : 1;  // lanes of a score
  static constant constexpr int ROW_LANES = OWN < TOKENS ? SHARING * TOKENS / OWN : SHARING;
  static constant constexpr int QUERY_MEMORY = R * LANES * Reader::PREPARED;  // threadgroup uint4
  static constant constexpr int RUN_WEIGHTS = (SCORES + 7) / 4 * 4;  // runs in different banks
  static constant constexpr int WEIGHTS = SIMDGROUPS * RUNS * RUN_WEIGHTS;
  static constant constexpr int SUMS = R * DV > WEIGHTS ? R * DV : WEIGHTS;
  static constant constexpr int SCRATCH = SUMS + 3 * R + 2 * SIMDGROUPS * R;  // ... and float

  static_assert(CHUNKS <= SIMD_SIZE && CHUNK % 4 == 0, "chunks");

  template <typename T>
  static METAL_FUNC void run(
      const device typename Layout::Element* pages, const device T* queries,
      const device int* block_table, const device int* seq_lens,
      const device float* sinks, const thread typename Reader::Constants& constants,
      const thread typename Output::Constants& output_constants, const constant int* parameters,
      device float* partials, device float* states, device T* output,
      threadgroup uint4* query_memory, threadgroup float* scratch, uint3 position, int simdgroup,
      int lane) {
    using End = SplitEnd<Output, G, Q, R, SIMDGROUPS, SINKS>;
    constexpr int TILES = (G * Q + R - 1) / R;
    int kv_head = int(position.x) / TILES, tile = int(position.x) % TILES;
    const SplitOutputs<T> outputs = {partials, states, output};
    int split = position.y, request = position.z;
    const constant DecodeParameters& decode = parameters_in<DecodeParameters>(parameters);
    const Splits splits(decode, seq_lens[request], Q);
    int split_first = splits.first + split * splits.split_tokens;
    if (split_first >= splits.seq_len) {
      End::write_nothing(decode, outputs, {kv_head, tile}, request, simdgroup, lane);
      return;
    }
    queries += ulong(request) * (Q * G * Layout::num_kv_heads * DK);
    int split_end = min(split_first + splits.split_tokens, splits.seq_len);
    int window = decode.window;
    float softcap = decode.softcap;

    threadgroup typename Reader::Query* query_rows =
        (threadgroup typename Reader::Query*)query_memory;
    threadgroup float* sums = scratch;  // [R, Dv], after the last token
    threadgroup float* row_scale = scratch + SUMS;
    threadgroup float* row_sum = row_scale + R;
    threadgroup float* row_shift = row_sum + R;
    threadgroup float* simdgroup_max = row_shift + R;  // [SIMDGROUPS, R]
    threadgroup float* simdgroup_sum = simdgroup_max + SIMDGROUPS * R;

    // Make the queries ready, once for all tokens.
    const Reader reader(constants);
    float scale = SOFTCAP ? decode.scale / softcap : decode.scale * LOG2_E;
    reader.template load_queries<G, Q, R, LANES, SIMDGROUPS, SOFTCAP>(
        queries, constants, {kv_head, tile}, scale, {query_rows, row_scale, row_sum, row_shift},
        simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // The scores of a run of tokens are spread over its lanes: this lane owns OWN of them, of one
    // row or of OWN_ROWS whole rows.
    int chunk = lane % LANES, run = lane / LANES;
    int key_chunk = min(chunk, KEY_CHUNKS - 1), value_chunk = min(chunk, VALUE_CHUNKS - 1);
    int own_first = chunk * SCORES / LANES;
    int own_row = own_first / TOKENS, own_token = own_first % TOKENS;
    int own_pair = own_token & ~1, own_place = own_token & 1;
    float own_scale[OWN_ROWS], own_sum[OWN_ROWS], own_shift[OWN_ROWS];
    int own_begin[OWN_ROWS], own_end[OWN_ROWS];
    SoftmaxState own[OWN_ROWS];
    UNROLL
    for (int i = 0; i < OWN_ROWS; i++) {
      int r = min(own_row + i, R - 1);
      own_scale[i] = row_scale[r] * reader.key_unit();
      own_sum[i] = row_sum[r];
      own_shift[i] = row_shift[r];
      int query = (tile * R + r) / G;
      own_end[i] = splits.seq_len - Q + 1 + query;
      own_begin[i] = window > 0 ? own_end[i] - window : 0;
      own_end[i] = min(own_end[i], split_end);
    }
    float out[R * CHUNK];
    UNROLL
    for (int i = 0; i < R * CHUNK; i++) {
      out[i] = 0.0f;
    }

    // The keys of a run are read while the values of the run before are added up.
    threadgroup float* run_weights =  // [PAIRS, ROWS, 2]
        scratch + (simdgroup * RUNS + run) * RUN_WEIGHTS;
    const threadgroup typename Reader::Query* query_chunk = query_rows + chunk * 4;
    int table_row = request * decode.max_blocks;
    int last_run = (split_end - 1) & ~(TOKENS - 1);
    int first_seen = window > 0 ? max(splits.seq_len - Q + 1 - window, 0) : 0;
    int first = split_first + simdgroup * STEP;
    uint safe = min(first + run * TOKENS, last_run);
    typename Layout::HeadPage page = Layout::head_page(
        pages, block_table[table_row + int(safe / Layout::block_size)], kv_head);
    typename Reader::template Keys<PAIRS> keys;
    keys.load(page, safe % Layout::block_size, key_chunk);
    for (; first < split_end; first += SIMDGROUPS * STEP) {
      // Read the values and scales of the run; look up the page of the next.
      int token = first + run * TOKENS;
      uint slot = safe % Layout::block_size;
      typename Reader::template Values<PAIRS> values;
      values.load(page, slot, value_chunk);
      typename Reader::template Scales<PAIRS, OWN_PAIRS> scales;
      scales.load(page, slot, key_chunk, own_pair);
      safe = min(token + SIMDGROUPS * STEP, last_run);
      int next_block = block_table[table_row + int(safe / Layout::block_size)];

      // Multiply this chunk of the keys with that of every row. Add up the chunks; each lane keeps
      // its own scores, in powers of two.
      float scores[LEFT];
      reader.template multiply<R, TOKENS, LANES, ADDED>(
          keys, scales, query_chunk, key_chunk, lane, scores);
      fold<LEFT, LANES / ADDED>(scores, lane, 1);
      bool visible[OWN];
      bool grows = false;
      UNROLL
      for (int i = 0; i < OWN; i++) {
        int row = i / TOKENS, which = own_token + i % TOKENS, place = own_place + i % TOKENS;
        scores[i] = scales.score(scores[i], own_scale[row], own_sum[row], place);
        if (SOFTCAP) {
          scores[i] = softcap * LOG2_E * precise::tanh(scores[i] + own_shift[row]);
        }
        visible[i] = token + which >= own_begin[row] && token + which < own_end[row];
        scores[i] = visible[i] ? scores[i] : -INFINITY;
        grows = grows || scores[i] > own[row].max + RESCALE_MARGIN;
      }

      // Move the maximum, but only when a score leaves its margin.
      if (simd_any(grows)) {
        float factors[ROWS];
        UNROLL
        for (int row = 0; row < OWN_ROWS; row++) {
          float largest = own[row].max;
          UNROLL
          for (int i = 0; i < OWN; i++) {
            largest = i / TOKENS == row ? max(largest, scores[i]) : largest;
          }
          UNROLL
          for (int mask = SHARING; mask < ROW_LANES; mask *= 2) {
            largest = max(largest, simd_shuffle_xor(largest, ushort(mask)));
          }
          factors[row] = own[row].rescale(largest);
        }
        spread<ROWS, LANES>(factors, lane);
        UNROLL
        for (int i = 0; i < R * CHUNK; i++) {
          out[i] *= factors[i / CHUNK];
        }
      }

      // Read the next keys. Not before the branch above: the compiler would hold them beside
      // those of this run, and wait for them to arrive where it copies them over.
      page = Layout::head_page(pages, next_block, kv_head);
      keys.load(page, safe % Layout::block_size, key_chunk);

      // Give every lane of the run all weights, value scales included.
      UNROLL
      for (int i = 0; i < OWN; i++) {
        float weight = own[i / TOKENS].update(scores[i]);
        float value_scale = scales.value(own_place + i % TOKENS);
        if (chunk % SHARING == 0) {
          int which = own_token + i % TOKENS, row = own_row + i / TOKENS;
          run_weights[(which / 2 * ROWS + row) * 2 + which % 2] =
              visible[i] ? weight * value_scale : 0.0f;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);

      // Add this chunk of the values to every row. A weight of zero hides every number, but no NaN.
      if (Reader::MAY_LEAK && (first < first_seen || first + STEP > split_end)) {
        UNROLL
        for (int i = 0; i < TOKENS; i++) {
          if (token + i < first_seen || token + i >= split_end) {
            values.clear(i);
          }
        }
      }
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        const typename Reader::Pair pair(values, p);
        float weights[2 * R];
        UNROLL
        for (int i = 0; i < 2 * R; i++) {
          weights[i] = run_weights[p * 2 * ROWS + i];
        }
        UNROLL
        for (int i = 0; i < CHUNK; i++) {
          float a, b;
          reader.value(pair, i, a, b);
          UNROLL
          for (int r = 0; r < R; r++) {
            out[r * CHUNK + i] = fma(weights[2 * r], a, out[r * CHUNK + i]);
            out[r * CHUNK + i] = fma(weights[2 * r + 1], b, out[r * CHUNK + i]);
          }
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    // Merge the runs of this simdgroup.
    float factors[ROWS];
    UNROLL
    for (int row = 0; row < OWN_ROWS; row++) {
      float largest = own[row].max;
      UNROLL
      for (int mask = LANES; mask < SIMD_SIZE; mask *= 2) {
        largest = max(largest, simd_shuffle_xor(largest, ushort(mask)));
      }
      factors[row] = own[row].rescale(largest);
      float sum = own[row].sum;
      UNROLL
      for (int mask = SHARING; mask < ROW_LANES; mask *= 2) {
        sum += simd_shuffle_xor(sum, ushort(mask));
      }
      UNROLL
      for (int mask = LANES; mask < SIMD_SIZE; mask *= 2) {
        sum += simd_shuffle_xor(sum, ushort(mask));
      }
      if (run == 0 && own_row + row < R) {
        simdgroup_max[simdgroup * R + own_row + row] = largest;
        simdgroup_sum[simdgroup * R + own_row + row] = sum;
      }
    }
    spread<ROWS, LANES>(factors, lane);
    UNROLL
    for (int i = 0; i < R * CHUNK; i++) {
      out[i] *= factors[i / CHUNK];
    }
    fold<R * CHUNK, RUNS>(out, lane, LANES);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Merge the simdgroups, one after the other.
    const SimdgroupStates<SIMDGROUPS, R> states_of_all = {simdgroup_max, simdgroup_sum};
    constexpr int HELD = R * CHUNK > RUNS ? R * CHUNK / RUNS : 1;
    int held_first = run * (R * CHUNK) / RUNS;
    for (int turn = 0; turn < SIMDGROUPS; turn++) {
      if (turn == simdgroup && chunk < VALUE_CHUNKS) {
        UNROLL
        for (int i = 0; i < HELD; i++) {
          int r = (held_first + i) / CHUNK, element = chunk * CHUNK + (held_first + i) % CHUNK;
          if (DV % CHUNK != 0 && element >= DV) {
            continue;
          }
          int index = r * DV + element;
          float factor =
              fast::exp2(simdgroup_max[simdgroup * R + r] - states_of_all.largest(r));
          float sum = out[i] * factor;
          sums[index] = turn == 0 ? sum : sums[index] + sum;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    End::write(
        Sums{sums, reader.value_unit()}, states_of_all, queries, sinks, output_constants, decode,
        outputs, {kv_head, tile}, split, request, simdgroup, lane);
  }

 private:
  // [R, Dv], without the unit.
  struct Sums {
    const threadgroup float* elements;
    float unit;
    METAL_FUNC float at(int r, int i) const thread { return elements[r * DV + i] * unit; }
  };
};
