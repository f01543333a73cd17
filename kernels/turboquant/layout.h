// Where the parts of a page are: the only pointer arithmetic on pages. `Page` is a pointer to the
// bytes of a head page, `const device uchar*` or, to write, `device uchar*`.
#pragma once

#include "paged/base.h"
#include "turboquant/constants.h"

template <PAGE_LAYOUT_PARAMETERS>
struct PageLayout {
  using Element = ushort;  // of the array of pages
  using HeadPage = const device uchar*;
  static constant constexpr int num_kv_heads = NUM_KV_HEADS;
  static constant constexpr int block_size = BLOCK_SIZE;
  static constant constexpr int key_head_size = KEY_HEAD_SIZE;
  static constant constexpr int value_head_size = VALUE_HEAD_SIZE;
  static constant constexpr int longer =
      KEY_HEAD_SIZE > VALUE_HEAD_SIZE ? KEY_HEAD_SIZE : VALUE_HEAD_SIZE;
  static constant constexpr int key_bits = KEY_BITS;
  static constant constexpr int value_bits = VALUE_BITS;
  static constant constexpr int key_terms = KEY_TERMS;
  static constant constexpr int value_terms = VALUE_TERMS;
  static constant constexpr bool key_has_levels = KEY_HAS_LEVELS;
  static constant constexpr bool key_has_bias = KEY_HAS_BIAS;

  static_assert(BLOCK_SIZE % BLOCK_SIZE_STEP == 0, "block size");

  // One KV head's page of a block.
  static METAL_FUNC HeadPage head_page(const device Element* pages, int block, int kv_head) {
    ulong begin = ulong(uint(block)) * PAGE_BYTES + uint(kv_head * HEAD_PAGE_BYTES);
    return (HeadPage)pages + begin;
  }

  // Codes of chunk `chunk` of the key or value in slot `slot` of a head page.
  template <typename Page>
  static METAL_FUNC Page key_codes(Page page, uint slot, uint chunk) {
    return page + (slot * (KEY_HEAD_SIZE * KEY_BITS / 8) + chunk * (2 * KEY_BITS));
  }

  template <typename Page>
  static METAL_FUNC Page value_codes(Page page, uint slot, uint chunk) {
    return page +
        (VALUE_CODES_OFFSET + slot * (VALUE_HEAD_SIZE * VALUE_BITS / 8) + chunk * (2 * VALUE_BITS));
  }

  // A key or value codes plus this are the next slot's.
  static constant constexpr int next_key = KEY_HEAD_SIZE * KEY_BITS / 8;
  static constant constexpr int next_value = VALUE_HEAD_SIZE * VALUE_BITS / 8;

  // A halfword for each slot: the levels of chunk `chunk` and its three neighbours, 4 bits each.
  template <typename Page>
  static METAL_FUNC Page key_levels(Page page, uint slot, uint chunk) {
    return page + (KEY_LEVELS_OFFSET + 2 * slot + chunk / 4 * (2 * BLOCK_SIZE));
  }

  // float16, one for each slot.
  template <typename Page>
  static METAL_FUNC Page key_scale(Page page, uint slot) {
    return page + (KEY_SCALES_OFFSET + 2 * slot);
  }

  template <typename Page>
  static METAL_FUNC Page key_bias(Page page, uint slot) {
    return page + (KEY_BIASES_OFFSET + 2 * slot);
  }

  template <typename Page>
  static METAL_FUNC Page value_scale(Page page, uint slot) {
    return page + (VALUE_SCALES_OFFSET + 2 * slot);
  }
};

// The scales (or biases, or levels) of an even slot and the next.
METAL_FUNC uint load_pair(const device uchar* scales) { return *(const device uint*)scales; }
