// Where keys and values are in a dense page: those of a block, [H, block_size, Dk], and then
// [H, block_size, Dv]. The only pointer arithmetic on dense pages.
#pragma once

#include "paged/base.h"

// One KV head of a block.
template <typename T>
struct DenseHeadPage {
  const device T* keys;
  const device T* values;
};

// VECTOR_BYTES: the largest power of 2, up to 16, on whose multiples every key and value begins.
template <
    typename T, int NUM_KV_HEADS, int BLOCK_SIZE, int KEY_HEAD_SIZE, int VALUE_HEAD_SIZE,
    int PAGE_ELEMENTS, int VECTOR_BYTES, int LANE_ELEMENTS>
struct DenseLayout {
  using Element = T;  // of the array of pages
  using HeadPage = DenseHeadPage<T>;
  static constant constexpr int num_kv_heads = NUM_KV_HEADS;
  static constant constexpr int block_size = BLOCK_SIZE;
  static constant constexpr int key_head_size = KEY_HEAD_SIZE;
  static constant constexpr int value_head_size = VALUE_HEAD_SIZE;
  static constant constexpr int vector_bytes = VECTOR_BYTES;
  static constant constexpr int lane_elements = LANE_ELEMENTS;

  static_assert(BLOCK_SIZE % BLOCK_SIZE_STEP == 0, "block size");

  static METAL_FUNC HeadPage head_page(const device T* pages, int block, int kv_head) {
    const device T* page = pages + ulong(uint(block)) * PAGE_ELEMENTS;
    return {
        page + kv_head * (BLOCK_SIZE * KEY_HEAD_SIZE),
        page + (NUM_KV_HEADS * BLOCK_SIZE * KEY_HEAD_SIZE + kv_head * BLOCK_SIZE * VALUE_HEAD_SIZE)};
  }

  static METAL_FUNC const device T* key(HeadPage page, uint slot) {
    return page.keys + slot * KEY_HEAD_SIZE;
  }

  static METAL_FUNC const device T* value(HeadPage page, uint slot) {
    return page.values + slot * VALUE_HEAD_SIZE;
  }
};
