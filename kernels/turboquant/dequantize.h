// Stored keys and values as the model had them.
#pragma once

#include "turboquant/codebook.h"
#include "turboquant/layout.h"
#include "turboquant/rotation.h"
#include "turboquant/unpacking.h"

// Where two neighbouring stored vectors are, and what multiplies and moves their centroids. Halves
// of words belong to one vector each.
struct StoredPair {
  const device uchar* codes_a;
  const device uchar* codes_b;
  uint levels;  // of this lane's chunk and its neighbours
  uint scales;
  uint biases;
};

// The scales of a pair of tokens, as their keys and values are to be read.
struct PairScales {
  uint keys;
  uint values;
};

// All bits of those halves that are NaN or infinite.
METAL_FUNC uint broken_halves(uint halves) {
  uint low = (halves & 0x7c00u) == 0x7c00u ? 0xffffu : 0u;
  uint high = (halves & 0x7c000000u) == 0x7c000000u ? 0xffff0000u : 0u;
  return low | high;
}

// A token whose key or value was not finite is read as a key of NaN and a value of zeros. MLX's
// attention replaces scores that are not seen, but multiplies every value, and 0 * NaN is NaN.
template <typename Layout>
METAL_FUNC PairScales load_scales(const device uchar* page, uint slot) {
  uint keys = load_pair(Layout::key_scale(page, slot));
  uint values = load_pair(Layout::value_scale(page, slot));
  uint broken = broken_halves(keys) | broken_halves(values);
  constexpr uint NAN_PAIR = uint(NAN_BITS) << 16 | uint(NAN_BITS);
  return {(keys & ~broken) | (NAN_PAIR & broken), values & ~broken};
}

// The centroids of a pair of rotated vectors, with levels, scales and biases: [2, D] in `rotated`.
template <int D, int BITS, int TERMS, bool HAS_LEVELS>
METAL_FUNC void read_pair(
    StoredPair stored, const device float* codebook, threadgroup float* rotated, int lane) {
  const Codebook<BITS, TERMS> points(codebook);
  half2 scale = as_type<half2>(stored.scales), bias = as_type<half2>(stored.biases);
  float unit_a = points.unit * float(scale.x), unit_b = points.unit * float(scale.y);
  if (HAS_LEVELS) {
    half2 weights = level_weights(stored.levels, lane);
    unit_a *= float(weights.x);
    unit_b *= float(weights.y);
  }
  if (lane < D / CHUNK) {
    Chunk<BITS> chunk;
    uint pairs[BITS];
    chunk.load(stored.codes_a + lane * 2 * BITS, stored.codes_b + lane * 2 * BITS);
    chunk.pairs(pairs);
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
      half2 point = points.at(grid_point<BITS>(pairs, i));
      rotated[lane * CHUNK + i] = float(point.x) * unit_a + float(bias.x);
      rotated[D + lane * CHUNK + i] = float(point.y) * unit_b + float(bias.y);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Rotates a vector back and writes it in the model's type. Keys have a centre, values have none.
template <int D, bool KEY, typename T>
METAL_FUNC void write_vector(
    const threadgroup float* rotated, const device float* factors, const device float* centre,
    device T* output, int lane) {
  Vector<D> y;
  UNROLL
  for (int block = 0; block < Vector<D>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<D>::W; i++) {
      y.x[block][i] =
          Vector<D>::holds(lane) ? rotated[Vector<D>::index(lane, block, i)] : 0.0f;
    }
  }
  y.rotate(lane);
  UNROLL
  for (int block = 0; block < Vector<D>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<D>::W; i++) {
      if (Vector<D>::holds(lane)) {
        int index = Vector<D>::index(lane, block, i);
        output[index] = T(y.x[block][i] * factors[index] + (KEY ? centre[index] : 0.0f));
      }
    }
  }
}

// Threadgroup memory of a simdgroup: a pair of rotated vectors.
template <typename Layout>
struct DequantizeScratch {
  static constant constexpr int SIZE = 2 * Layout::longer;
};

// Tokens first .. first + n - 1 (first even) of one request, in the KV heads from first_head on:
// keys [heads, n, Dk], values [heads, n, Dv].
template <typename Layout, int SIMDGROUPS, typename T>
METAL_FUNC void dequantize_tokens(
    const device ushort* pages, const device int* block_table, const device float* centre,
    const device float* query_factors, const device float* value_factors,
    const device float* key_codebook, const device float* value_codebook,
    const constant int* parameters, device T* keys, device T* values, threadgroup float* scratch,
    uint3 position, int simdgroup, int lane) {
  constexpr int DK = Layout::key_head_size;
  constexpr int DV = Layout::value_head_size;
  const constant ReadParameters& run = parameters_in<ReadParameters>(parameters);
  int vector = int(position.x) * SIMDGROUPS + simdgroup;
  int offset = vector / 2 * 2, row = position.y, head = run.first_head + row;
  if (offset >= run.num_tokens) {
    return;
  }
  int token = run.first_token + offset;
  const device uchar* page =
      Layout::head_page(pages, block_table[token / Layout::block_size], head);
  uint slot = token % Layout::block_size;
  int count = offset + 1 < run.num_tokens ? 2 : 1;
  ulong output_row = ulong(row) * run.num_tokens + offset;
  threadgroup float* rotated = scratch + simdgroup * DequantizeScratch<Layout>::SIZE;
  const PairScales scales = load_scales<Layout>(page, slot);
  if (vector % 2 == 0) {
    uint chunk = min(lane, DK / CHUNK - 1);
    const StoredPair stored = {
        Layout::key_codes(page, slot, 0), Layout::key_codes(page, slot + 1, 0),
        Layout::key_has_levels ? load_pair(Layout::key_levels(page, slot, chunk)) : 0u,
        scales.keys,
        Layout::key_has_bias ? load_pair(Layout::key_bias(page, slot)) : 0u};
    read_pair<DK, Layout::key_bits, Layout::key_terms, Layout::key_has_levels>(
        stored, key_codebook, rotated, lane);
    for (int i = 0; i < count; i++) {
      write_vector<DK, true>(
          rotated + i * DK, query_factors + head * DK, centre + head * DK,
          keys + (output_row + i) * DK, lane);
    }
  } else {
    const StoredPair stored = {
        Layout::value_codes(page, slot, 0), Layout::value_codes(page, slot + 1, 0), 0u,
        scales.values, 0u};
    read_pair<DV, Layout::value_bits, Layout::value_terms, false>(
        stored, value_codebook, rotated, lane);
    for (int i = 0; i < count; i++) {
      write_vector<DV, false>(
          rotated + i * DV, value_factors, centre, values + (output_row + i) * DV, lane);
    }
  }
}
