// How decode reads dense pages: see paged/decode.h for what a reader is. Products and sums are
// floats, whatever the type of the pages.
#pragma once

#include "dense/elements.h"
#include "dense/layout.h"
#include "dense/output.h"
#include "paged/decode.h"

template <typename DenseLayout>
struct DenseReader {
  using Layout = DenseLayout;
  using T = typename Layout::Element;
  using HeadPage = typename Layout::HeadPage;
  using Query = float;
  static constant constexpr int LANE_ELEMENTS = Layout::lane_elements;
  static constant constexpr int PREPARED = LANE_ELEMENTS / 4;
  static constant constexpr bool MAY_LEAK = true;  // other layers may have left any bytes
  static constant constexpr int DK = Layout::key_head_size;
  static constant constexpr int DV = Layout::value_head_size;
  using Part = Elements<T, LANE_ELEMENTS>;

  struct Constants {};

  METAL_FUNC DenseReader(const thread Constants&) {}

  METAL_FUNC float key_unit() const thread { return 1.0f; }

  METAL_FUNC float value_unit() const thread { return 1.0f; }

  template <int G, int Q, int R, int LANES, int SIMDGROUPS, bool SOFTCAP, typename Given>
  METAL_FUNC void load_queries(
      const device Given* queries, const thread Constants&, QueryTile which, float scale,
      QueryRows<float> rows, int simdgroup, int lane) const thread {
    for (int r = simdgroup; r < R; r += SIMDGROUPS) {
      const QueryPlace<Layout, G, Q, R> place(which, r);
      threadgroup float* elements = rows.elements + r * LANES * LANE_ELEMENTS;
      for (int i = lane; i < LANES * LANE_ELEMENTS; i += SIMD_SIZE) {
        int chunk = i / LANE_ELEMENTS, quarter = i % LANE_ELEMENTS / 4;
        elements[(quarter * LANES + chunk) * 4 + i % 4] =
            place.real && i < DK ? float(queries[place.begin + i]) : 0.0f;
      }
      if (lane == 0) {
        rows.scale[r] = scale;
        rows.sum[r] = 0.0f;
        rows.shift[r] = 0.0f;
      }
    }
  }

  template <int PAIRS>
  struct Keys {
    Part tokens[2 * PAIRS];

    METAL_FUNC void load(HeadPage page, uint slot, int chunk) thread {
      UNROLL
      for (int i = 0; i < 2 * PAIRS; i++) {
        tokens[i].template load<DK, Layout::vector_bytes>(
            Layout::key(page, slot + i), chunk * LANE_ELEMENTS);
      }
    }
  };

  template <int PAIRS>
  struct Values {
    Part tokens[2 * PAIRS];

    METAL_FUNC void load(HeadPage page, uint slot, int chunk) thread {
      UNROLL
      for (int i = 0; i < 2 * PAIRS; i++) {
        tokens[i].template load<DV, Layout::vector_bytes>(
            Layout::value(page, slot + i), chunk * LANE_ELEMENTS);
      }
    }

    METAL_FUNC void clear(int i) thread { tokens[i].clear(); }
  };

  template <int PAIRS, int OWN_PAIRS>
  struct Scales {
    METAL_FUNC void load(HeadPage, uint, int, int) thread {}

    METAL_FUNC float score(float product, float row_scale, float, int) const thread {
      return product * row_scale;
    }

    METAL_FUNC float value(int) const thread { return 1.0f; }
  };

  static METAL_FUNC constexpr int added(int, int) { return 1; }

  template <int R, int TOKENS, int LANES, int ADDED, int OWN_PAIRS, int LEFT>
  METAL_FUNC void multiply(
      const thread Keys<TOKENS / 2>& run, const thread Scales<TOKENS / 2, OWN_PAIRS>&,
      const threadgroup float* query_chunk, int, int, thread float (&scores)[LEFT]) const thread {
    float dots[R][TOKENS];
    UNROLL
    for (int r = 0; r < R; r++) {
      UNROLL
      for (int t = 0; t < TOKENS; t++) {
        dots[r][t] = 0.0f;
      }
    }
    UNROLL
    for (int part = 0; part < LANE_ELEMENTS / 4; part++) {
      float keys[TOKENS][4];
      UNROLL
      for (int t = 0; t < TOKENS; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
          keys[t][i] = run.tokens[t].at(part * 4 + i);
        }
      }
      UNROLL
      for (int r = 0; r < R; r++) {
        uint4 words =
            *(const threadgroup uint4*)(query_chunk + (r * (LANE_ELEMENTS / 4) + part) * LANES * 4);
        UNROLL
        for (int t = 0; t < TOKENS; t++) {
          dots[r][t] = fma(as_type<float>(words.x), keys[t][0], dots[r][t]);
          dots[r][t] = fma(as_type<float>(words.y), keys[t][1], dots[r][t]);
          dots[r][t] = fma(as_type<float>(words.z), keys[t][2], dots[r][t]);
          dots[r][t] = fma(as_type<float>(words.w), keys[t][3], dots[r][t]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < LEFT; i++) {
      scores[i] = dots[row_of<TOKENS, R>(i)][i % TOKENS];
    }
  }

  // The values of two neighbouring tokens.
  struct Pair {
    Part a, b;

    template <int PAIRS>
    METAL_FUNC Pair(const thread Values<PAIRS>& run, int p)
        : a(run.tokens[2 * p]), b(run.tokens[2 * p + 1]) {}
  };

  METAL_FUNC void value(
      const thread Pair& pair, int i, thread float& a, thread float& b) const thread {
    a = pair.a.at(i);
    b = pair.b.at(i);
  }
};
