// Attention of query rows over one split of a request's tokens, by products of matrices.
#pragma once

#include "paged/fragments.h"
#include "paged/queries.h"
#include "paged/softmax.h"
#include "paged/split_end.h"
#include "paged/splits.h"

// Weights are halves, relative to a power of two that keeps them far from both ends of a half's
// range: when it moves, the largest weight is 2^WEIGHT_START to 2^(WEIGHT_START + 1), and it moves
// again when one passes 2^15. The scale of a value is part of its weight.
constant constexpr float WEIGHT_START = 7.0f;
constant constexpr float LARGEST_WEIGHT = 32768.0f;
constant constexpr float LARGEST_SUMMAND = 1099511627776.0f;  // 2^40, of a value with a small scale
constant constexpr float SMALLEST_SCALE = 5.9604644775390625e-08f;  // 2^-24, of those above 0

// Where a tile of GROUPS groups of 8 tokens lies: all in one page, or each group in its own.
template <typename Layout, int GROUPS>
struct TilePlace {
  static constant constexpr bool ONE_PAGE = Layout::block_size % (GROUPS * FRAGMENT_TOKENS) == 0;
  static constant constexpr int PAGES = ONE_PAGE ? 1 : GROUPS;
  static constant constexpr int ALIGNED = ONE_PAGE ? GROUPS * FRAGMENT_TOKENS : FRAGMENT_TOKENS;
  typename Layout::HeadPage page[PAGES];
  uint slot[PAGES];  // of the first token in the page

  METAL_FUNC typename Layout::HeadPage page_of(int n) const thread {
    return page[ONE_PAGE ? 0 : n];
  }
  METAL_FUNC uint slot_of(int n) const thread {
    return ONE_PAGE ? slot[0] + n * FRAGMENT_TOKENS : slot[n];
  }
};

// What a page holds is known to a reader of fragments alone (turboquant/matrix_reader.h), which is a
// type with these members:
//
//   Layout, GROUPS            where things are; groups of 8 tokens that a lane reads at a time
//   KEY_CHUNKS, ROW_SIZE      elements of a row of queries as it lies in threadgroup memory
//   QUERY_WORDS, VALUE_WORDS  words of queries of a lane; elements of the output of a line
//   Query, Constants          as for paged/decode.h
//   load_queries              the rows of a threadgroup, made ready and in order
//   query, start              the halves of a lane's query words; what scores begin with
//   Keys, Values, Scales      what a lane reads of a tile; loading does not wait, using does
//   add_scores, add_values    products of a tile
//   value_line, value_word    where an element of a value is in the output
//   key_unit, value_unit      factors that products and values lack
//
// Up to 8 rows of one KV head over one split. A simdgroup reads a tile of neighbouring tokens at a
// time, one group of 8 or two. What they come to goes where split_end.h has it; the maximum of a
// softmax state is the power that weights are relative to.
template <
    typename Reader, typename Output, int G, int Q, int R, int SIMDGROUPS, bool SOFTCAP,
    bool SINKS>
struct MatrixDecode {
  using Layout = typename Reader::Layout;
  using Place = TilePlace<Layout, Reader::GROUPS>;
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int GROUPS = Reader::GROUPS;
  static constant constexpr int TOKENS = GROUPS * FRAGMENT_TOKENS;
  static constant constexpr int QUERY_WORDS = Reader::QUERY_WORDS;
  static constant constexpr int VALUE_WORDS = Reader::VALUE_WORDS;
  static constant constexpr int ROW_SIZE = Reader::ROW_SIZE;
  static constant constexpr bool QUERIES_HELD = QUERY_WORDS <= Fragments::QUERY_REGISTERS;
  // Threadgroup words: query rows; query fragments unless lanes hold them; later on, sums.
  static constant constexpr int ROW_WORDS = R * ROW_SIZE / 2;
  static constant constexpr int FRAGMENT_WORDS = QUERIES_HELD ? 0 : QUERY_WORDS * SIMD_SIZE;
  static constant constexpr int SUM_STRIDE = VALUE_WORDS * 8 + 4;  // rows in different banks
  static constant constexpr int SUMS = FRAGMENT_ROWS * SUM_STRIDE;
  static constant constexpr int SHARED =
      ROW_WORDS + FRAGMENT_WORDS > SUMS ? ROW_WORDS + FRAGMENT_WORDS : SUMS;
  static constant constexpr int MEMORY =
      (SHARED + 3 * R + 2 * SIMDGROUPS * FRAGMENT_ROWS + 3) / 4;  // threadgroup uint4

  // The two rows of a lane's scores see the same tokens, or each its own: they may belong to two
  // query tokens where either number is odd.
  static constant constexpr int VIEWS = Q > 1 && (G % 2 == 1 || R % 2 == 1) ? 2 : 1;

  static_assert(R <= FRAGMENT_ROWS, "rows");

  // The query fragments of a lane: its own, or in threadgroup memory.
  struct HeldQueries {
    half2 words[QUERY_WORDS];
    METAL_FUNC half2 at(int i) const thread { return words[i]; }
  };
  struct SharedQueries {
    const threadgroup uint* words;  // of this lane
    METAL_FUNC half2 at(int i) const thread { return as_type<half2>(words[i * SIMD_SIZE]); }
  };

  // A word of queries, from rows in threadgroup memory.
  static METAL_FUNC half2 query_word(const threadgroup half* rows, int word, int lane) {
    return half2(query_half(rows, word, 0, lane), query_half(rows, word, 1, lane));
  }
  static METAL_FUNC half query_half(const threadgroup half* rows, int word, int i, int lane) {
    int row = Fragments::query_row(lane, i);
    return row < R
        ? Reader::query(
              rows + row * ROW_SIZE, word, Fragments::query_column(lane),
              Fragments::query_part(lane, i))
        : half(0.0f);
  }

  static METAL_FUNC void query_fragments(
      thread SharedQueries& queries, const threadgroup half* rows, threadgroup uint* fragments,
      int simdgroup, int lane) {
    for (int word = simdgroup; word < QUERY_WORDS; word += SIMDGROUPS) {
      fragments[word * SIMD_SIZE + lane] = as_type<uint>(query_word(rows, word, lane));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    queries.words = fragments + lane;
  }
  static METAL_FUNC void query_fragments(
      thread HeldQueries& queries, const threadgroup half* rows, threadgroup uint*, int,
      int lane) {
    UNROLL
    for (int word = 0; word < QUERY_WORDS; word++) {
      queries.words[word] = query_word(rows, word, lane);
    }
  }

  template <bool FIRST, typename A, typename B>
  struct Choice {
    using Type = A;
  };
  template <typename A, typename B>
  struct Choice<false, A, B> {
    using Type = B;
  };

  template <typename T>
  static METAL_FUNC void run(
      const device typename Layout::Element* pages, const device T* queries,
      const device int* block_table, const device int* seq_lens,
      const device float* sinks, const thread typename Reader::Constants& constants,
      const thread typename Output::Constants& output_constants, const constant int* parameters,
      device float* partials, device float* states, device T* output, threadgroup uint4* memory,
      uint3 position, int simdgroup, int lane) {
    using End = SplitEnd<Output, G, Q, R, SIMDGROUPS, SINKS>;
    using QueryWords =
        typename Choice<QUERIES_HELD, HeldQueries, SharedQueries>::Type;
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

    threadgroup typename Reader::Query* query_rows = (threadgroup typename Reader::Query*)memory;
    threadgroup float* sums = (threadgroup float*)memory;  // after the last token
    threadgroup float* row_scale = sums + SHARED;
    threadgroup float* row_sum = row_scale + R;
    threadgroup float* row_shift = row_sum + R;
    threadgroup float* simdgroup_max = row_shift + R;  // [SIMDGROUPS, 8]
    threadgroup float* simdgroup_sum = simdgroup_max + SIMDGROUPS * FRAGMENT_ROWS;

    // Make the queries ready, once for all tokens, and make fragments of them.
    const Reader reader(constants);
    float scale = SOFTCAP ? decode.scale / softcap : decode.scale * LOG2_E;
    reader.template load_queries<G, Q, R, SIMDGROUPS, SOFTCAP>(
        queries, constants, {kv_head, tile}, scale, {query_rows, row_scale, row_sum, row_shift},
        simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    QueryWords query_words;
    query_fragments(
        query_words, query_rows, (threadgroup uint*)memory + ROW_WORDS, simdgroup, lane);

    // The two rows of this lane's scores, and the tokens that they see.
    float own_scale[2], own_sum[2], own_shift[2], start[2];
    int own_begin[2], own_end[2];
    SoftmaxState own[2];
    UNROLL
    for (int i = 0; i < 2; i++) {
      int r = min(2 * Fragments::column(lane) + i, R - 1);
      own_scale[i] = row_scale[r] * reader.key_unit();
      own_sum[i] = row_sum[r];
      own_shift[i] = row_shift[r];
      own_end[i] = splits.seq_len - Q + 1 + (tile * R + r) / G;
      own_begin[i] = max(window > 0 ? own_end[i] - window : 0, split_first);
      own_end[i] = min(own_end[i], split_end);
      start[i] = Reader::start(query_rows + r * ROW_SIZE, lane);
    }
    // Tokens that all rows see.
    int first_end = splits.seq_len - Q + 1 + tile * R / G;
    int last_end = splits.seq_len - Q + 1 + (tile * R + R - 1) / G;
    int all_begin = max(window > 0 ? last_end - window : 0, split_first);
    int all_end = min(first_end, split_end);

    float held[VALUE_WORDS / 2][2][2];
    UNROLL
    for (int word = 0; word < VALUE_WORDS; word++) {
      held[word / 2][word % 2][0] = 0.0f;
      held[word / 2][word % 2][1] = 0.0f;
    }

    // A tile lies in one page, or each of its groups does. Its keys are read while the values of
    // the tile before are added up, and its page is looked up before that.
    constexpr int PAGES = Place::PAGES, ALIGNED = Place::ALIGNED;
    const device int* table_row = block_table + request * decode.max_blocks;
    int last = (split_end - 1) & ~(ALIGNED - 1);
    int first = (split_first & ~(ALIGNED - 1)) + simdgroup * TOKENS;
    uint safe[PAGES];
    int block[PAGES];
    Place place;
    UNROLL
    for (int n = 0; n < PAGES; n++) {
      safe[n] = min(first + n * FRAGMENT_TOKENS, last);
      block[n] = table_row[safe[n] / Layout::block_size];
      place.page[n] = Layout::head_page(pages, block[n], kv_head);
      place.slot[n] = safe[n] % Layout::block_size;
    }
    typename Reader::Keys keys;
    keys.load(place, lane);
    for (; first < split_end; first += SIMDGROUPS * TOKENS) {
      // Read the values and scales of the tile; look up the page of the next.
      typename Reader::Values values;
      values.load(place, lane);
      typename Reader::Scales scales;
      scales.load(place, lane);
      UNROLL
      for (int n = 0; n < PAGES; n++) {
        safe[n] = min(first + SIMDGROUPS * TOKENS + n * FRAGMENT_TOKENS, last);
        block[n] = table_row[safe[n] / Layout::block_size];
      }

      // Scores, in powers of two.
      float scores[GROUPS][2], value_scale[GROUPS][VIEWS];
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        value_scale[n][0] = value_scale[n][VIEWS - 1] = scales.value(n);
        scores[n][0] = start[0];
        scores[n][1] = start[1];
      }
      reader.add_scores(scores, query_words, keys, lane);
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
          scores[n][i] = scales.score(n, scores[n][i], own_scale[i], own_sum[i]);
          if (SOFTCAP) {
            scores[n][i] = softcap * LOG2_E * precise::tanh(scores[n][i] + own_shift[i]);
          }
        }
      }
      // A token that is not seen has no scale either: that may be NaN.
      if (first < all_begin || first + TOKENS > all_end) {
        UNROLL
        for (int n = 0; n < GROUPS; n++) {
          int token = first + n * FRAGMENT_TOKENS + Fragments::line(lane);
          UNROLL
          for (int i = 0; i < 2; i++) {
            bool seen = token >= own_begin[i] && token < own_end[i];
            scores[n][i] = seen ? scores[n][i] : -INFINITY;
            if (i < VIEWS) {
              value_scale[n][i] = seen ? value_scale[n][i] : 0.0f;
            }
          }
        }
      }

      // Weights. The power that those of a row are relative to moves only when one is too large, and
      // whatever the other rows hold.
      float summands[GROUPS][2], products[GROUPS][2];
      bool large[2];
      weigh(scores, value_scale, own, summands, products, large);
      if (simd_any(large[0] || large[1])) {
        float factors[2];
        UNROLL
        for (int i = 0; i < 2; i++) {
          float largest = -INFINITY;
          UNROLL
          for (int n = 0; n < GROUPS; n++) {
            largest = max(largest, scores[n][i] + power_below(value_scale[n][i % VIEWS]));
          }
          largest = Fragments::largest(largest) - WEIGHT_START;
          bool moves = Fragments::largest(large[i] ? 1.0f : 0.0f) > 0.0f;
          factors[i] = own[i].rescale(moves ? max(own[i].max, largest) : own[i].max);
        }
        UNROLL
        for (int word = 0; word < VALUE_WORDS; word++) {
          held[word / 2][word % 2][0] *= factors[0];
          held[word / 2][word % 2][1] *= factors[1];
        }
        weigh(scores, value_scale, own, summands, products, large);
      }

      // Read the next keys. Not before the branch above: the compiler would hold them beside
      // those of this tile, and wait for them to arrive where it copies them over.
      UNROLL
      for (int n = 0; n < PAGES; n++) {
        place.page[n] = Layout::head_page(pages, block[n], kv_head);
        place.slot[n] = safe[n] % Layout::block_size;
      }
      keys.load(place, lane);

      half2 weights[GROUPS];
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        own[0].sum += summands[n][0];
        own[1].sum += summands[n][1];
        weights[n] = Fragments::placed(rounded_halves(products[n][0], products[n][1]));
      }
      reader.add_values(held, values, weights, lane);
    }

    // Merge the simdgroups, one after the other.
    int first_row = 2 * Fragments::column(lane);
    UNROLL
    for (int i = 0; i < 2; i++) {
      float sum = Fragments::sum(own[i].sum);
      if (Fragments::line(lane) == 0) {
        simdgroup_max[simdgroup * FRAGMENT_ROWS + first_row + i] = own[i].max;
        simdgroup_sum[simdgroup * FRAGMENT_ROWS + first_row + i] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const SimdgroupStates<SIMDGROUPS, FRAGMENT_ROWS> states_of_all = {
        simdgroup_max, simdgroup_sum};
    float factors[2];
    UNROLL
    for (int k = 0; k < 2; k++) {
      int r = first_row + k;
      factors[k] = fast::exp2(
          simdgroup_max[simdgroup * FRAGMENT_ROWS + r] - states_of_all.largest(r));
    }
    for (int turn = 0; turn < SIMDGROUPS; turn++) {
      if (turn == simdgroup) {
        UNROLL
        for (int i = 0; i < VALUE_WORDS; i++) {
          UNROLL
          for (int k = 0; k < 2; k++) {
            int index = sum_index(first_row + k, Fragments::line(lane), i);
            float sum = held[i / 2][i % 2][k] * factors[k];
            sums[index] = turn == 0 ? sum : sums[index] + sum;
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    End::write(
        Sums{sums, reader.value_unit()}, states_of_all, queries, sinks, output_constants, decode,
        outputs, {kv_head, tile}, split, request, simdgroup, lane);
  }

 private:
  // Weights of the scores: to be summed up, and times the scales of the values; and whether one of
  // a row is too large.
  static METAL_FUNC void weigh(
      const thread float (&scores)[GROUPS][2], const thread float (&value_scale)[GROUPS][VIEWS],
      const thread SoftmaxState (&own)[2], thread float (&summands)[GROUPS][2],
      thread float (&products)[GROUPS][2], thread bool (&large)[2]) {
    UNROLL
    for (int i = 0; i < 2; i++) {
      large[i] = false;
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        summands[n][i] = fast::exp2(scores[n][i] - own[i].max);
        products[n][i] = summands[n][i] * value_scale[n][i % VIEWS];
        large[i] = large[i] || products[n][i] > LARGEST_WEIGHT ||
            summands[n][i] > LARGEST_SUMMAND;
      }
    }
  }

  // Where an element of the output is in threadgroup memory: neighbouring lanes in different banks.
  static METAL_FUNC int sum_index(int row, int line, int word) {
    return row * SUM_STRIDE + word * 8 + line;
  }

  struct Sums {
    const threadgroup float* elements;
    float unit;
    METAL_FUNC float at(int r, int i) const thread {
      return elements[sum_index(r, Reader::value_line(i), Reader::value_word(i))] * unit;
    }
  };

  // The power of two at a value's scale or below it.
  static METAL_FUNC float power_below(float scale) {
    return float(int(as_type<uint>(max(scale, SMALLEST_SCALE)) >> 23 & 255u) - 127);
  }
};
