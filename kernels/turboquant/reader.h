// How decode reads compressed pages: see paged/decode.h for what a reader is.
//
// Two neighbouring tokens ride in the two halves of each word, from the codes to the dot products.
#pragma once

#include "paged/decode.h"
#include "turboquant/codebook.h"
#include "turboquant/output.h"
#include "turboquant/queries.h"
#include "turboquant/unpacking.h"

// Half `i` of one or two words.
template <int WORDS>
METAL_FUNC float pick(const thread uint (&words)[WORDS], int i) {
  uint word = WORDS > 1 && i >= 2 ? words[WORDS - 1] : words[0];
  return float(as_type<half2>(i % 2 ? word >> 16 : word).x);
}

// Chunks of a run of neighbouring tokens, STRIDE bytes apart.
template <int STRIDE, int BITS, int PAIRS>
METAL_FUNC void load_run(thread Chunk<BITS> (&run)[PAIRS], const device uchar* codes) {
  UNROLL
  for (int p = 0; p < PAIRS; p++) {
    run[p].load(codes + 2 * p * STRIDE, codes + (2 * p + 1) * STRIDE);
  }
}

template <typename PageLayout>
struct CompressedReader {
  using Layout = PageLayout;
  using Query = half;
  static constant constexpr int LANE_ELEMENTS = CHUNK;
  static constant constexpr int PREPARED = CHUNK / 8;
  static constant constexpr bool MAY_LEAK = false;  // codes stand for finite numbers

  struct Constants {
    const device float* query_factors;
    const device float* centre;
    const device float* key_codebook;
    const device float* value_codebook;
  };

  Codebook<Layout::key_bits, Layout::key_terms> key_codebook;
  Codebook<Layout::value_bits, Layout::value_terms> value_codebook;

  METAL_FUNC CompressedReader(const thread Constants& constants)
      : key_codebook(constants.key_codebook), value_codebook(constants.value_codebook) {}

  METAL_FUNC float key_unit() const thread { return key_codebook.unit; }

  METAL_FUNC float value_unit() const thread { return value_codebook.unit; }

  template <int G, int Q, int R, int LANES, int SIMDGROUPS, bool SOFTCAP, typename T>
  METAL_FUNC void load_queries(
      const device T* queries, const thread Constants& constants, QueryTile which, float scale,
      QueryRows<half> rows, int simdgroup, int lane) const thread {
    QueryLoader<Layout, G, Q, R, LANES, SIMDGROUPS, SOFTCAP, InQuarters>::load(
        queries, constants.query_factors, constants.centre, which, scale, rows, simdgroup, lane);
  }

  template <int PAIRS>
  struct Keys {
    Chunk<Layout::key_bits> codes[PAIRS];

    METAL_FUNC void load(const device uchar* page, uint slot, int chunk) thread {
      load_run<Layout::next_key>(codes, Layout::key_codes(page, slot, chunk));
    }
  };

  template <int PAIRS>
  struct Values {
    Chunk<Layout::value_bits> codes[PAIRS];

    METAL_FUNC void load(const device uchar* page, uint slot, int chunk) thread {
      load_run<Layout::next_value>(codes, Layout::value_codes(page, slot, chunk));
    }

    METAL_FUNC void clear(int) thread {}
  };

  // Of a run of 2 * PAIRS tokens: the levels of all of them, for one chunk, and the scales of those
  // whose scores the lane owns.
  template <int PAIRS, int OWN_PAIRS>
  struct Scales {
    uint key_levels[PAIRS];
    uint key_scales[OWN_PAIRS], key_biases[OWN_PAIRS], value_scales[OWN_PAIRS];

    METAL_FUNC void load(
        const device uchar* page, uint slot, int key_chunk, int own_pair) thread {
      if (Layout::key_has_levels) {
        load_words(Layout::key_levels(page, slot, key_chunk), key_levels);
      }
      UNROLL
      for (int p = 0; p < OWN_PAIRS; p++) {
        uint pair = slot + own_pair + 2 * p;
        key_scales[p] = load_pair(Layout::key_scale(page, pair));
        key_biases[p] = Layout::key_has_bias ? load_pair(Layout::key_bias(page, pair)) : 0u;
        value_scales[p] = load_pair(Layout::value_scale(page, pair));
      }
    }

    // A finished product as a score; `place` is the token among the own ones.
    METAL_FUNC float score(float product, float row_scale, float row_sum, int place) const thread {
      float scored = product * (row_scale * pick(key_scales, place));
      return Layout::key_has_bias ? scored + row_sum * pick(key_biases, place) : scored;
    }

    METAL_FUNC float value(int place) const thread { return pick(value_scales, place); }
  };

  // Lanes whose products are added while they are halves.
  static METAL_FUNC constexpr int added(int scores, int lanes) {
    return scores > 2 && lanes > 1 ? 2 : 1;
  }

  template <int R, int TOKENS, int LANES, int ADDED, int OWN_PAIRS, int LEFT>
  METAL_FUNC void multiply(
      const thread Keys<TOKENS / 2>& run, const thread Scales<TOKENS / 2, OWN_PAIRS>& scales,
      const threadgroup half* query_chunk, int key_chunk, int lane,
      thread float (&scores)[LEFT]) const thread {
    constexpr int PAIRS = TOKENS / 2;
    half2 dots[R][PAIRS];
    UNROLL
    for (int r = 0; r < R; r++) {
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        dots[r][p] = half2(half(0.0f), half(0.0f));
      }
    }
    uint key_pairs[PAIRS][Layout::key_bits];
    UNROLL
    for (int p = 0; p < PAIRS; p++) {
      run.codes[p].pairs(key_pairs[p]);
    }
    UNROLL
    for (int part = 0; part < CHUNK / 4; part++) {
      half2 keys[PAIRS][4];
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
          keys[p][i] = key_codebook.at(grid_point<Layout::key_bits>(key_pairs[p], part * 4 + i));
        }
      }
      UNROLL
      for (int r = 0; r < R; r++) {
        uint2 words =
            *(const threadgroup uint2*)(query_chunk + (r * (CHUNK / 4) + part) * LANES * 4);
        half2 first = as_type<half2>(words.x), second = as_type<half2>(words.y);
        UNROLL
        for (int p = 0; p < PAIRS; p++) {
          dots[r][p] = fma(half2(first.x, first.x), keys[p][0], dots[r][p]);
          dots[r][p] = fma(half2(first.y, first.y), keys[p][1], dots[r][p]);
          dots[r][p] = fma(half2(second.x, second.x), keys[p][2], dots[r][p]);
          dots[r][p] = fma(half2(second.y, second.y), keys[p][3], dots[r][p]);
        }
      }
    }
    if (Layout::key_has_levels) {
      UNROLL
      for (int p = 0; p < PAIRS; p++) {
        half2 weights = level_weights(scales.key_levels[p], key_chunk);
        UNROLL
        for (int r = 0; r < R; r++) {
          dots[r][p] = dots[r][p] * weights;
        }
      }
    }
    UNROLL
    for (int i = 0; i < LEFT; i += 2) {
      half2 dot = dots[row_of<TOKENS, R>(i)][i % TOKENS / 2];
      if (ADDED == 2) {
        int other = i + LEFT;
        half2 higher = dots[row_of<TOKENS, R>(other)][other % TOKENS / 2];
        dot = fold_halves(dot, higher, lane, LANES / 2);
      }
      scores[i] = float(dot.x);
      scores[i + 1] = float(dot.y);
    }
  }

  // The values of two neighbouring tokens.
  struct Pair {
    uint words[Layout::value_bits];

    template <int PAIRS>
    METAL_FUNC Pair(const thread Values<PAIRS>& run, int p) {
      run.codes[p].pairs(words);
    }
  };

  // Element i of both.
  METAL_FUNC void value(
      const thread Pair& pair, int i, thread float& a, thread float& b) const thread {
    half2 values = value_codebook.at(grid_point<Layout::value_bits>(pair.words, i));
    a = float(values.x);
    b = float(values.y);
  }
};
