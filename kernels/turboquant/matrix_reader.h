// How the matrix form of decode reads compressed pages: see paged/matrix.h for what a reader is.
#pragma once

#include "paged/matrix.h"
#include "turboquant/eight_codes.h"
#include "turboquant/layout.h"
#include "turboquant/output.h"
#include "turboquant/queries.h"

METAL_FUNC void load_chunk(const device uchar* codes, thread uint (&words)[1]) {
  load_words(codes, words);
}
METAL_FUNC void load_chunk(const device uchar* codes, thread uint (&words)[2]) {
  load_words(codes, words);
}
METAL_FUNC void load_chunk(const device uchar* codes, thread uint (&words)[3]) {
  load_words(codes, words);
}
METAL_FUNC void load_chunk(const device uchar* codes, thread uint (&words)[4]) {
  load_words(codes, words);
}
template <int BITS>
METAL_FUNC void load_chunk(const device uchar* codes, thread ushort (&halfwords)[BITS]) {
  UNROLL
  for (int j = 0; j < BITS; j++) {
    halfwords[j] = ((const device ushort*)codes)[j];
  }
}

// Codes of a chunk of one key as they lie in memory.
template <int BITS, bool EVEN = BITS % 2 == 0>
struct KeyChunk {
  uint codes[BITS / 2];
};
template <int BITS>
struct KeyChunk<BITS, false> {
  ushort codes[BITS];
};

// What a lane reads of GROUPS groups of 8 neighbouring tokens. Of a key of `line(lane)` it reads
// KEYS neighbouring chunks; of the values of tokens `2 column(lane)` and the next, VALUES
// neighbouring chunks, or one half of a chunk where 8 lines have 4 chunks.
template <typename PageLayout, int NUM_GROUPS>
struct CompressedMatrices {
  using Layout = PageLayout;
  using Query = half;
  static constant constexpr int GROUPS = NUM_GROUPS;
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  static constant constexpr int KEY_BITS = Layout::key_bits;
  static constant constexpr int VALUE_BITS = Layout::value_bits;
  static constant constexpr int KEY_CHUNKS = DK / CHUNK;
  static constant constexpr int VALUE_CHUNKS = DV / CHUNK;
  static constant constexpr int KEYS = (KEY_CHUNKS + 3) / 4;
  static constant constexpr bool HALVED = VALUE_CHUNKS <= 4;
  static constant constexpr int VALUES = HALVED ? 1 : (VALUE_CHUNKS + 7) / 8;
  static constant constexpr int KEY_WORDS = 8 * KEYS;  // pairs of elements of a key
  static constant constexpr int VALUE_WORDS = HALVED ? 8 : 16 * VALUES;  // elements of a value
  // With levels, a word for two chunks, of which the last may be empty.
  static constant constexpr int LEVEL_WORDS = Layout::key_has_levels ? (KEYS + 1) / 2 : 0;
  static constant constexpr int QUERY_WORDS = KEY_WORDS + LEVEL_WORDS;
  // Keys are multiplied as (2 code - n) / n: half a step too low.
  static constant constexpr bool KEYS_LOW = Layout::key_has_levels || KEY_BITS == 8;
  static constant constexpr float HALF_STEP = 1.0f / float(1 << KEY_BITS);

  static constant constexpr int ROW_SIZE = 4 * KEYS * CHUNK;

  struct Constants {
    const device float* query_factors;
    const device float* centre;
    const device float* key_codebook;
    const device float* value_codebook;
  };

  Codebook<KEY_BITS, Layout::key_terms> key_codebook;
  Codebook<VALUE_BITS, Layout::value_terms> value_codebook;

  METAL_FUNC CompressedMatrices(const thread Constants& constants)
      : key_codebook(constants.key_codebook), value_codebook(constants.value_codebook) {}

  METAL_FUNC float key_unit() const thread { return key_codebook.unit; }

  METAL_FUNC float value_unit() const thread { return value_codebook.unit; }

  template <int G, int Q, int R, int SIMDGROUPS, bool SOFTCAP, typename T>
  METAL_FUNC void load_queries(
      const device T* queries, const thread Constants& constants, QueryTile which, float scale,
      QueryRows<half> rows, int simdgroup, int lane) const thread {
    QueryLoader<Layout, G, Q, R, ROW_SIZE / CHUNK, SIMDGROUPS, SOFTCAP, InOrder>::load(
        queries, constants.query_factors, constants.centre, which, scale, rows, simdgroup, lane);
  }

  // What a key's pair of elements in word `word` and column `column` is multiplied by: element
  // `part` of the pair, from a row of queries. Words from KEY_WORDS on belong to levels.
  static METAL_FUNC half query(const threadgroup half* row, int word, int column, int part) {
    if (word < KEY_WORDS) {
      int chunk = column * KEYS + word / 8;
      return row[chunk * CHUNK + EightCodes<KEY_BITS>::index(part, word % 8)];
    }
    int which = 2 * (word - KEY_WORDS) + part, chunk = column * KEYS + which;
    return which < KEYS && chunk < KEY_CHUNKS
        ? half(half_steps<CHUNK>(row + chunk * CHUNK)) : half(0.0f);
  }

  // What scores begin with: half a step of each element, where there are no levels.
  static METAL_FUNC float start(const threadgroup half* row, int lane) {
    if (!KEYS_LOW || Layout::key_has_levels) {
      return 0.0f;
    }
    constexpr int SHARE = ROW_SIZE / FRAGMENT_TOKENS;
    return Fragments::sum(half_steps<SHARE>(row + Fragments::line(lane) * SHARE));
  }

  // Line and word of the output where element `index` of a value is.
  static METAL_FUNC int value_line(int index) {
    int chunk = index / CHUNK;
    return HALVED ? 2 * chunk + int(EightCodes<VALUE_BITS>::place(index % CHUNK).upper)
                  : chunk / VALUES;
  }
  static METAL_FUNC int value_word(int index) {
    int chunk = index / CHUNK;
    return HALVED ? EightCodes<VALUE_BITS>::place(index % CHUNK).j
                  : chunk % VALUES * CHUNK + index % CHUNK;
  }

  using Place = TilePlace<Layout, GROUPS>;

  // Levels of a lane's keys: halfwords with those of four chunks.
  struct Levels {
    static constant constexpr bool ALIGNED = KEY_CHUNKS % 4 == 0 && (KEYS == 2 || KEYS % 4 == 0);
    static constant constexpr int LOADS = ALIGNED ? (KEYS + 3) / 4 : KEYS;
    uint halfwords[LOADS];

    METAL_FUNC void load(const device uchar* page, uint slot, int lane) thread {
      int column = Fragments::column(lane);
      UNROLL
      for (int i = 0; i < LOADS; i++) {
        int chunk = min(column * KEYS + (ALIGNED ? 4 * i : i), KEY_CHUNKS - 1);
        halfwords[i] =
            *(const device ushort*)Layout::key_levels(page, slot, chunk);
      }
    }

    // The weights of chunks 2 word and 2 word + 1; exact.
    METAL_FUNC half2 weights(int word, int lane) const thread {
      int column = Fragments::column(lane);
      if (ALIGNED) {
        uint levels = KEYS == 2 ? halfwords[0] >> (column % 2 * 8)
                                : halfwords[word / 2] >> (word % 2 * 8);
        return level_weights(levels | levels << 12, 0);
      }
      int other = 2 * word + 1 < KEYS ? 2 * word + 1 : KEYS - 1;
      int first = min(column * KEYS + 2 * word, KEY_CHUNKS - 1);
      int second = min(column * KEYS + other, KEY_CHUNKS - 1);
      uint low = halfwords[2 * word < LOADS ? 2 * word : 0] >> (first % 4 * 4);
      uint high = halfwords[other < LOADS ? other : 0] >> (second % 4 * 4);
      return level_weights((low & 0xffffu) | high << 16, 0);
    }
  };

  // Keys of a lane, and the levels that they are multiplied with first.
  struct Keys {
    KeyChunk<KEY_BITS> chunks[GROUPS][KEYS];
    Levels levels[GROUPS];

    METAL_FUNC void load(const thread Place& place, int lane) thread {
      int column = Fragments::column(lane);
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        uint slot = place.slot_of(n) + Fragments::line(lane);
        if (Layout::key_has_levels) {
          levels[n].load(place.page_of(n), slot, lane);
        }
        UNROLL
        for (int c = 0; c < KEYS; c++) {
          int chunk = min(column * KEYS + c, KEY_CHUNKS - 1);
          load_chunk(Layout::key_codes(place.page_of(n), slot, chunk), chunks[n][c].codes);
        }
      }
    }
  };

  struct Scales {
    float key_scale[GROUPS], key_bias[GROUPS], value_scale[GROUPS];

    METAL_FUNC void load(const thread Place& place, int lane) thread {
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        const device uchar* page = place.page_of(n);
        uint slot = place.slot_of(n) + Fragments::line(lane);
        key_scale[n] = load_half(Layout::key_scale(page, slot));
        key_bias[n] = Layout::key_has_bias ? load_half(Layout::key_bias(page, slot)) : 0.0f;
        value_scale[n] = load_half(Layout::value_scale(page, slot));
      }
    }

    // A finished product with a key of group n as a score.
    METAL_FUNC float score(int n, float product, float row_scale, float row_sum) const thread {
      float scored = product * (row_scale * key_scale[n]);
      return Layout::key_has_bias ? scored + row_sum * key_bias[n] : scored;
    }

    METAL_FUNC float value(int n) const thread { return value_scale[n]; }
  };

  // Adds the products of all keys with all rows. `queries` has QUERY_WORDS words.
  template <typename Queries>
  METAL_FUNC void add_scores(
      thread float (&scores)[GROUPS][2], const thread Queries& queries, const thread Keys& keys,
      int lane) const thread {
    UNROLL
    for (int c = 0; c < KEYS; c++) {
      EightCodes<KEY_BITS> codes[GROUPS];
      half2 unit[GROUPS], offset[GROUPS];
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        codes[n].take_key(keys.chunks[n][c].codes);
        if (KEYS_LOW) {
          low_grid(keys.levels[n], c, unit[n], offset[n], lane);
        }
      }
      UNROLL
      for (int j = 0; j < 8; j += 2) {
        half2 pairs[2][GROUPS];
        UNROLL
        for (int i = 0; i < 2; i++) {
          UNROLL
          for (int n = 0; n < GROUPS; n++) {
            pairs[i][n] = KEYS_LOW
                ? fma(codes[n].template placed<POSITION>(j + i), unit[n], offset[n])
                : key_codebook.at(codes[n].point(j + i));
          }
        }
        Fragments::add_scores(
            scores, queries.at(c * 8 + j), queries.at(c * 8 + j + 1), pairs[0], pairs[1]);
      }
    }
    UNROLL
    for (int word = 0; word < LEVEL_WORDS; word++) {
      half2 weights[GROUPS];
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        weights[n] = keys.levels[n].weights(word, lane);
      }
      Fragments::add_scores(scores, queries.at(KEY_WORDS + word), weights);
    }
  }

  // Codes of a lane's values of tokens 2 column and 2 column + 1 of each group.
  struct Values {
    Chunk<VALUE_BITS> chunks[GROUPS][VALUES];

    METAL_FUNC void load(const thread Place& place, int lane) thread {
      int line = Fragments::line(lane);
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        uint slot = place.slot_of(n) + 2 * Fragments::column(lane);
        UNROLL
        for (int c = 0; c < VALUES; c++) {
          int chunk = min(HALVED ? line / 2 : line * VALUES + c, VALUE_CHUNKS - 1);
          const device uchar* codes = Layout::value_codes(place.page_of(n), slot, chunk);
          chunks[n][c].load(codes, codes + Layout::next_value);
        }
      }
    }
  };

  // Adds the values of all groups, with their weights, to all rows.
  METAL_FUNC void add_values(
      thread float (&output)[VALUE_WORDS / 2][2][2], const thread Values& values,
      const thread half2 (&weights)[GROUPS], int lane) const thread {
    bool upper = Fragments::line(lane) % 2 == 1;
    UNROLL
    for (int c = 0; c < VALUES; c++) {
      uint pairs[GROUPS][VALUE_BITS];
      EightCodes<VALUE_BITS> halves[GROUPS];
      UNROLL
      for (int n = 0; n < GROUPS; n++) {
        values.chunks[n][c].pairs(pairs[n]);
        if (HALVED) {
          halves[n].take_values(pairs[n], upper);
        }
      }
      constexpr int WORDS = HALVED ? 8 : CHUNK;
      UNROLL
      for (int i = 0; i < WORDS; i += 2) {
        half2 a[GROUPS], b[GROUPS];
        UNROLL
        for (int n = 0; n < GROUPS; n++) {
          a[n] = value_codebook.at(
              HALVED ? halves[n].point(i % 8) : grid_point<VALUE_BITS>(pairs[n], i));
          b[n] = value_codebook.at(
              HALVED ? halves[n].point((i + 1) % 8) : grid_point<VALUE_BITS>(pairs[n], i + 1));
        }
        Fragments::add_values(output[(c * WORDS + i) / 2], a, b, weights);
      }
    }
  }

 private:
  static METAL_FUNC float load_half(const device uchar* address) {
    return float(*(const device half*)address);
  }

  // Half a step of each of COUNT elements.
  template <int COUNT>
  static METAL_FUNC float half_steps(const threadgroup half* elements) {
    float total = 0.0f;
    UNROLL
    for (int i = 0; i < COUNT; i++) {
      total += float(elements[i]);
    }
    return total * HALF_STEP;
  }

  // Where the fields of keys that are low are placed: 1024 + 2^POSITION n / 2 has so few bits that
  // its product with any level is exact.
  static constant constexpr int POSITION = KEY_BITS == 8 ? 0 : KEY_BITS == 5 ? 5 : 4;

  // What makes (2 code - n) / n, times its chunk's weight, of a placed code: both exact.
  static METAL_FUNC void low_grid(
      const thread Levels& levels, int chunk, thread half2& unit, thread half2& offset,
      int lane) {
    constexpr float STEP = 2.0f * HALF_STEP / float(1 << POSITION);
    constexpr float BEGIN = -1024.0f - float(1 << POSITION) / (2.0f * HALF_STEP);
    half step = half(STEP), begin = half(BEGIN), product = half(STEP * BEGIN);
    unit = half2(step, step);
    offset = half2(product, product);
    if (Layout::key_has_levels) {
      half2 weights = levels.weights(chunk / 2, lane);
      half weight = chunk % 2 == 1 ? weights.y : weights.x;
      unit = half2(weight, weight) * unit;
      offset = unit * half2(begin, begin);
    }
  }
};
