// Neighbouring elements of a dense vector, as they lie in memory.
#pragma once

#include "paged/base.h"

// Element `i` of those that begin at words[0].
template <typename T, int WORDS, int SIZE = sizeof(T)>
struct ElementOf {
  static METAL_FUNC float at(const thread uint (&words)[WORDS], int i) {
    return float(as_type<T>(ushort(i % 2 ? words[i / 2] >> 16 : words[i / 2])));
  }
};

template <typename T, int WORDS>
struct ElementOf<T, WORDS, 4> {
  static METAL_FUNC float at(const thread uint (&words)[WORDS], int i) {
    return as_type<T>(words[i]);
  }
};

// COUNT elements in words of 32 bits: two to a word, or one where they are floats.
template <typename T, int COUNT>
struct Elements {
  static constant constexpr int SIZE = sizeof(T);
  static constant constexpr int WORDS = COUNT * SIZE / 4;
  uint words[WORDS];

  // Reads elements first .. first + COUNT - 1 of a vector of D, BYTES at a time. Those past its end
  // are zeros.
  template <int D, int BYTES>
  METAL_FUNC void load(const device T* vector, int first) thread {
    static_assert(COUNT * SIZE % 16 == 0 && D * SIZE % BYTES == 0, "whole loads");
    UNROLL
    for (int i = 0; i < COUNT; i += BYTES / SIZE) {
      bool inside = D % COUNT == 0 || first + i < D;
      load_words<BYTES>((const device uchar*)(vector + first + i), i * SIZE / 4, i % 2, inside);
    }
  }

  METAL_FUNC float at(int i) const thread { return ElementOf<T, WORDS>::at(words, i); }

  METAL_FUNC void clear() thread {
    UNROLL
    for (int i = 0; i < WORDS; i++) {
      words[i] = 0;
    }
  }

 private:
  // BYTES bytes to the words from `word` on, or to one of its halves.
  template <int BYTES>
  METAL_FUNC void load_words(
      const device uchar* from, int word, bool upper, bool inside) thread {
    if (BYTES == 16) {
      words[word] = words[word + 1] = words[word + 2] = words[word + 3] = 0;
      if (inside) {
        uint4 loaded = *(const device uint4*)from;
        words[word] = loaded.x;
        words[word + 1] = loaded.y;
        words[word + 2] = loaded.z;
        words[word + 3] = loaded.w;
      }
    } else if (BYTES == 8) {
      words[word] = words[word + 1] = 0;
      if (inside) {
        uint2 loaded = *(const device uint2*)from;
        words[word] = loaded.x;
        words[word + 1] = loaded.y;
      }
    } else if (BYTES == 4) {
      words[word] = 0;
      if (inside) {
        words[word] = *(const device uint*)from;
      }
    } else {
      uint loaded = 0;
      if (inside) {
        loaded = *(const device ushort*)from;
      }
      words[word] = upper ? words[word] | loaded << 16 : loaded;
    }
  }
};
