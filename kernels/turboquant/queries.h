// Query rows for compressed keys: rotated, scaled and rounded to half.
#pragma once

#include "paged/queries.h"
#include "turboquant/layout.h"
#include "turboquant/rotation.h"

// Where element `index` of a row lies: as paged/queries.h has it for LANES lanes, or in order.
template <int LANES>
struct InQuarters {
  static METAL_FUNC int place(int index) {
    return index % CHUNK / 4 * LANES * 4 + index / CHUNK * 4 + index % 4;
  }
};
template <int LANES>
struct InOrder {
  static METAL_FUNC int place(int index) { return index; }
};

template <
    typename Layout, int G, int Q, int R, int LANES, int SIMDGROUPS, bool SOFTCAP,
    template <int> class Order>
struct QueryLoader {
  static constant constexpr int DK = Layout::key_head_size;
  using Row = Vector<DK>;

  // Loads the rows of this simdgroup.
  template <typename T>
  static METAL_FUNC void load(
      const device T* queries, const device float* query_factors, const device float* centre,
      QueryTile which, float scale, QueryRows<half> rows, int simdgroup, int lane) {
    for (int r = simdgroup; r < R; r += SIMDGROUPS) {
      Row q;
      float shift = read(q, queries, query_factors, centre, which, r, lane);
      q.rotate(lane);
      float largest = 0.0f, total = 0.0f;
      UNROLL
      for (int block = 0; block < Row::M; block++) {
        UNROLL
        for (int i = 0; i < Row::W; i++) {
          largest = max(largest, abs(q.x[block][i]));
          total += q.x[block][i];
        }
      }
      largest = simd_max(largest);
      float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
      write(rows.elements + r * LANES * CHUNK, q, inverse, lane);
      total = simd_sum(total);
      shift = simd_sum(shift);
      if (lane == 0) {
        rows.scale[r] = largest * scale;
        rows.sum[r] = total * scale;
        rows.shift[r] = shift * scale;
      }
    }
  }

 private:
  // Row r of the tile times the factors of its KV head, zeros past the last row; returns this
  // lane's part of its product with the centre.
  template <typename T>
  static METAL_FUNC float read(
      thread Row& q, const device T* queries, const device float* query_factors,
      const device float* centre, QueryTile which, int r, int lane) {
    const QueryPlace<Layout, G, Q, R> place(which, r);
    const device T* query = queries + place.begin;
    float shift = 0.0f;
    UNROLL
    for (int block = 0; block < Row::M; block++) {
      UNROLL
      for (int i = 0; i < Row::W; i++) {
        int index = Row::index(lane, block, i);
        float element = place.real && Row::holds(lane) ? float(query[index]) : 0.0f;
        if (SOFTCAP && Row::holds(lane)) {
          shift += element * centre[which.kv_head * DK + index];
        }
        q.x[block][i] =
            Row::holds(lane) ? element * query_factors[which.kv_head * DK + index] : 0.0f;
      }
    }
    return shift;
  }

  // A rotated row as halves, zeros past its last chunk.
  static METAL_FUNC void write(
      threadgroup half* elements, const thread Row& q, float inverse, int lane) {
    for (int i = lane; i < LANES * CHUNK; i += SIMD_SIZE) {
      elements[i] = half(0.0f);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int block = 0; block < Row::M; block++) {
      UNROLL
      for (int i = 0; i < Row::W; i++) {
        if (Row::holds(lane)) {
          elements[Order<LANES>::place(Row::index(lane, block, i))] =
              half(q.x[block][i] * inverse);
        }
      }
    }
  }
};
