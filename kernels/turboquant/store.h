// New keys and values into their pages.
//
// The kernel writes through `pages`, which MLX hands over as an input. Readers must bind the
// kernel's output to be ordered after it.
#pragma once

#include "turboquant/grouped_quantizer.h"
#include "turboquant/layout.h"
#include "turboquant/packing.h"

// Stores one new key or value. One that is not finite after the rotation is stored as zeros would
// be, with NaN as its scale: the output of every query that sees it is NaN, and of no other.
template <
    typename Layout, bool KEY, int D, int BITS, int TERMS, bool HAS_LEVELS, bool HAS_BIAS,
    typename T>
METAL_FUNC void store_vector(
    const device T* vector, const device float* centre, const device float* factors,
    const device float* codebook, device uchar* page, uint slot, threadgroup uchar* codes,
    int lane) {
  Vector<D> y;
  UNROLL
  for (int block = 0; block < Vector<D>::M; block++) {
    UNROLL
    for (int i = 0; i < Vector<D>::W; i++) {
      int index = Vector<D>::index(lane, block, i);
      float element = Vector<D>::holds(lane) ? float(vector[index]) : 0.0f;
      if (Vector<D>::holds(lane)) {
        element = rounded_product(KEY ? element - centre[index] : element, factors[index]);
      }
      y.x[block][i] = element;
    }
  }
  y.rotate(lane);
  const bool broken = !y.all_finite();
  if (broken) {
    y.fill(0.0f);
  }
  half scale = half(0.0f), bias = half(0.0f);
  if (HAS_LEVELS) {
    constexpr int CHUNKS = D / CHUNK;
    threadgroup uchar* levels = codes + D;
    GroupedQuantizer<D, BITS>::quantize(y, codebook, codes, levels, scale, lane);
    for (int quad = lane; quad < (CHUNKS + 3) / 4; quad += SIMD_SIZE) {
      *(device ushort*)Layout::key_levels(page, slot, quad * 4) =
          packed_levels<CHUNKS>(levels, quad * 4);
    }
  } else {
    Quantizer<D, BITS, TERMS, HAS_BIAS, !KEY>::quantize(y, codebook, codes, scale, bias, lane);
  }
  device uchar* target =
      KEY ? Layout::key_codes(page, slot, 0) : Layout::value_codes(page, slot, 0);
  pack_codes<D, BITS>(codes, (device ushort*)target, lane);
  if (lane == 0) {
    scale = broken ? as_type<half>(ushort(NAN_BITS)) : scale;
    *(device half*)(KEY ? Layout::key_scale(page, slot) : Layout::value_scale(page, slot)) = scale;
    if (HAS_BIAS) {
      *(device half*)Layout::key_bias(page, slot) = bias;
    }
  }
}

// Threadgroup memory of a simdgroup: the codes and levels of its vector.
template <typename Layout>
struct StoreScratch {
  static constant constexpr int SIZE = Layout::longer + Layout::longer / CHUNK;
};

// All new vectors of a layer: keys [T, H, Dk], values [T, H, Dv]. Slots below 0 are skipped.
template <typename Layout, int SIMDGROUPS, typename Key, typename Value>
METAL_FUNC void store_vectors(
    const device ushort* pages, const device Key* keys, const device Value* values,
    const device int* slot_mapping, const device float* centre, const device float* key_factors,
    const device float* value_factors, const device float* key_codebook,
    const device float* value_codebook, const constant int* parameters, device uint* token,
    threadgroup uchar* codes, uint3 position, int simdgroup, int lane) {
  constexpr int DK = Layout::key_head_size;
  constexpr int DV = Layout::value_head_size;
  constexpr int H = Layout::num_kv_heads;
  int vector = int(position.x) * SIMDGROUPS + simdgroup;
  if (vector < TOKEN_WORDS && lane == 0) {
    token[vector] = 0;
  }
  int row = vector / 2, head = row % H, new_token = row / H;
  if (new_token >= parameters_in<StoreParameters>(parameters).num_tokens) {
    return;
  }
  int mapped = slot_mapping[new_token];
  if (mapped < 0) {
    return;
  }
  device uchar* page = (device uchar*)Layout::head_page(pages, mapped / Layout::block_size, head);
  uint slot = mapped % Layout::block_size;
  threadgroup uchar* own_codes = codes + simdgroup * StoreScratch<Layout>::SIZE;
  if (vector % 2 == 0) {
    store_vector<
        Layout, true, DK, Layout::key_bits, Layout::key_terms, Layout::key_has_levels,
        Layout::key_has_bias>(
        keys + ulong(row) * DK, centre + head * DK, key_factors + head * DK, key_codebook, page,
        slot, own_codes, lane);
  } else {
    store_vector<Layout, false, DV, Layout::value_bits, Layout::value_terms, false, false>(
        values + ulong(row) * DV, centre, value_factors, value_codebook, page, slot, own_codes,
        lane);
  }
}
