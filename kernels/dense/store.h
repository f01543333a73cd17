// New keys and values into dense pages.
//
// The kernel writes through `pages`, which MLX hands over as an input. Readers must bind the
// kernel's output to be ordered after it.
#pragma once

#include "dense/layout.h"
#include "paged/arithmetic.h"

// Whether the pages' type holds an element of this lane as no finite number.
template <typename T, int D, typename Given>
METAL_FUNC bool has_broken(const device Given* vector, int lane) {
  bool broken = false;
  for (int i = lane; i < D; i += SIMD_SIZE) {
    broken = broken || !is_finite(float(T(float(vector[i]))));
  }
  return broken;
}

// All new vectors of a layer: keys [T, H, Dk], values [T, H, Dv], one of either to a simdgroup.
// Slots below 0 are skipped. A token with a key or value that is not finite, as the pages have it,
// is stored as a key of NaN and a value of zeros: what sees it becomes NaN, and nothing else.
template <typename Layout, int SIMDGROUPS, typename Key, typename Value>
METAL_FUNC void store_vectors(
    const device typename Layout::Element* pages, const device Key* keys,
    const device Value* values, const device int* slot_mapping, const constant int* parameters,
    device uint* token, uint3 position, int simdgroup, int lane) {
  using T = typename Layout::Element;
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
  const typename Layout::HeadPage page =
      Layout::head_page(pages, mapped / Layout::block_size, head);
  uint slot = mapped % Layout::block_size;
  const device Key* key = keys + ulong(row) * DK;
  const device Value* value = values + ulong(row) * DV;
  const bool broken = simd_any(has_broken<T, DK>(key, lane) || has_broken<T, DV>(value, lane));
  if (vector % 2 == 0) {
    device T* target = (device T*)Layout::key(page, slot);
    for (int i = lane; i < DK; i += SIMD_SIZE) {
      target[i] = T(broken ? as_type<float>(0x7fc00000u) : float(key[i]));
    }
  } else {
    device T* target = (device T*)Layout::value(page, slot);
    for (int i = lane; i < DV; i += SIMD_SIZE) {
      target[i] = T(broken ? 0.0f : float(value[i]));
    }
  }
}
