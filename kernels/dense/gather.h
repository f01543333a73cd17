// Stored keys and values of one request, one after the other.
#pragma once

#include "dense/elements.h"
#include "dense/layout.h"

// Copies COUNT vectors of D elements, which lie side by side in both places.
template <int D, int BYTES, int COUNT, typename T, typename Made>
struct Copy {
  static METAL_FUNC void run(const device T* from, device Made* to, int lane) {
    for (int i = lane; i < COUNT * D; i += SIMD_SIZE) {
      to[i] = Made(float(from[i]));
    }
  }
};

// Of one type: as bytes, in the widest words that both places allow.
template <int D, int BYTES, int COUNT, typename T>
struct Copy<D, BYTES, COUNT, T, T> {
  static METAL_FUNC void run(const device T* from, device T* to, int lane) {
    constexpr int WORDS = COUNT * D * int(sizeof(T)) / BYTES;
    for (int i = lane; i < WORDS; i += SIMD_SIZE) {
      if (BYTES == 16) {
        ((device uint4*)to)[i] = ((const device uint4*)from)[i];
      } else if (BYTES == 8) {
        ((device uint2*)to)[i] = ((const device uint2*)from)[i];
      } else if (BYTES == 4) {
        ((device uint*)to)[i] = ((const device uint*)from)[i];
      } else {
        ((device ushort*)to)[i] = ((const device ushort*)from)[i];
      }
    }
  }
};

template <int D, int BYTES, typename T, typename Made>
METAL_FUNC void copy_vectors(
    const device T* from, device Made* to, int count, int lane) {
  if (count == 2) {
    Copy<D, BYTES, 2, T, Made>::run(from, to, lane);
  } else {
    Copy<D, BYTES, 1, T, Made>::run(from, to, lane);
  }
}

// Tokens first .. first + n - 1 (first even) of one request, in the KV heads from first_head on:
// keys [heads, n, Dk], values [heads, n, Dv]. A simdgroup copies the keys or the values of two.
template <typename Layout, int SIMDGROUPS, typename T>
METAL_FUNC void gather_tokens(
    const device typename Layout::Element* pages, const device int* block_table,
    const constant int* parameters, device T* keys, device T* values, uint3 position,
    int simdgroup, int lane) {
  constexpr int DK = Layout::key_head_size;
  constexpr int DV = Layout::value_head_size;
  const constant ReadParameters& run = parameters_in<ReadParameters>(parameters);
  int vector = int(position.x) * SIMDGROUPS + simdgroup;
  int offset = vector / 2 * 2, row = position.y;
  if (offset >= run.num_tokens) {
    return;
  }
  int token = run.first_token + offset;
  const typename Layout::HeadPage page = Layout::head_page(
      pages, block_table[token / Layout::block_size], run.first_head + row);
  uint slot = token % Layout::block_size;
  int count = offset + 1 < run.num_tokens ? 2 : 1;
  ulong output_row = ulong(row) * run.num_tokens + offset;
  if (vector % 2 == 0) {
    copy_vectors<DK, Layout::vector_bytes>(
        Layout::key(page, slot), keys + output_row * DK, count, lane);
  } else {
    copy_vectors<DV, Layout::vector_bytes>(
        Layout::value(page, slot), values + output_row * DV, count, lane);
  }
}
