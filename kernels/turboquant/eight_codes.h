// Half of a chunk's codes beside the other half, for products of matrices.
//
// The 16 codes of a chunk fall into 8 lower and 8 upper ones, such that lower code j and upper code
// j lie at the same bits of two halfwords, or can be brought there at once. Halfwords 2m and 2m + 1
// hold the lower and the upper codes of a word. With an odd number of bits, the fields of the last
// halfword are shared out; what is left over and the codes in spare bits go to words of their own.
#pragma once

#include "turboquant/codebook.h"
#include "turboquant/unpacking.h"

// Where code `index` of a chunk is among its halves.
struct HalfPlace {
  bool upper;
  int j;
};

template <int BITS>
struct EightCodes {
  static constant constexpr int FIELDS = 16 / BITS;
  static constant constexpr int WORDS = BITS / 2;  // with FIELDS codes each
  static constant constexpr bool ODD = BITS % 2 == 1;
  static constant constexpr int SHARED = ODD ? FIELDS / 2 : 0;  // codes of the odd word
  static constant constexpr int WHOLE = FIELDS * WORDS;
  static constant constexpr int SPARE = 8 - WHOLE - SHARED;

  uint words[WORDS + ODD];
  uint spare[SPARE > 0 ? SPARE : 1];  // one code each, from bit 1

  // The index in the chunk of lower (part 0) or upper (part 1) code j.
  static METAL_FUNC int index(int part, int j) {
    if (j < WHOLE) {
      return FIELDS * (2 * (j / FIELDS) + part) + j % FIELDS;
    }
    if (j < WHOLE + SHARED) {
      return 2 * WHOLE + part * SHARED + j - WHOLE;
    }
    return 2 * (WHOLE + SHARED) + part * SPARE + j - WHOLE - SHARED;
  }

  // The way back.
  static METAL_FUNC HalfPlace place(int index) {
    if (index < 2 * WHOLE) {
      int halfword = index / FIELDS;
      return {halfword % 2 == 1, halfword / 2 * FIELDS + index % FIELDS};
    }
    constexpr int SHARES = SHARED > 0 ? SHARED : 1, SPARES = SPARE > 0 ? SPARE : 1;
    int rest = index - 2 * WHOLE;
    if (rest < 2 * SHARED) {
      return {rest / SHARES == 1, WHOLE + rest % SHARES};
    }
    rest -= 2 * SHARED;
    return {rest / SPARES == 1, WHOLE + SHARED + rest % SPARES};
  }

  // Both halves of one chunk of a key, in the two halves of each word.
  METAL_FUNC void take_key(const thread uint (&chunk)[WORDS]) thread {
    UNROLL
    for (int m = 0; m < WORDS; m++) {
      words[m] = chunk[m];
    }
    if (BITS == 6) {  // the spare bits of halfwords j and j + 3 belong together
      ushort2 a = as_type<ushort2>(chunk[0]), b = as_type<ushort2>(chunk[WORDS > 1 ? 1 : 0]);
      ushort2 c = as_type<ushort2>(chunk[WORDS > 2 ? 2 : 0]);
      uint pairs[3] = {
          as_type<uint>(ushort2(a.x, b.y)), as_type<uint>(ushort2(a.y, c.x)),
          as_type<uint>(ushort2(b.x, c.y))};
      take_spare_of_six(pairs);
    }
  }

  METAL_FUNC void take_key(const thread ushort (&chunk)[BITS]) thread {
    UNROLL
    for (int m = 0; m < WORDS; m++) {
      words[m] = as_type<uint>(ushort2(chunk[2 * m], chunk[2 * m + 1]));
    }
    uint last = chunk[BITS - 1], rest = 0;
    words[WORDS] = as_type<uint>(ushort2(ushort(last), ushort(last >> (SHARED * BITS))));
    UNROLL
    for (int j = 0; j < BITS; j++) {
      rest |= spare_piece<BITS>(chunk[j], j, 0);
    }
    spare[0] = as_type<uint>(ushort2(ushort(last >> ((FIELDS - 1) * BITS - 1)), ushort(rest)));
  }

  // One half of a chunk of the values of two tokens.
  METAL_FUNC void take_values(const thread uint (&pairs)[BITS], bool upper) thread {
    UNROLL
    for (int m = 0; m < WORDS; m++) {
      uint low = pairs[2 * m], high = pairs[2 * m + 1];
      words[m] = upper ? high : low;
    }
    if (ODD) {
      uint last = pairs[BITS - 1], shifted = last >> (SHARED * BITS), rest = 0;
      words[WORDS + ODD - 1] = upper ? shifted : last;
      UNROLL
      for (int j = 0; j < BITS; j++) {
        rest |= spare_piece<BITS>(pairs[j], j, 0);
      }
      uint left = last >> (ODD ? (FIELDS - 1) * BITS - 1 : 0);
      spare[0] = upper ? rest : left;
    }
    if (BITS == 6) {
      uint halves[3];
      UNROLL
      for (int j = 0; j < 3; j++) {
        uint low = pairs[j < BITS ? j : 0], high = pairs[j + 3 < BITS ? j + 3 : 0];
        halves[j] = upper ? high : low;
      }
      take_spare_of_six(halves);
    }
  }

  // Lower and upper code j as points of the grid, like `grid_point`.
  METAL_FUNC half2 point(int j) const thread {
    return j < WHOLE + SHARED ? field_point<BITS>(words[word_of(j)], field_of(j) * BITS)
                              : field_point<BITS>(spare[spare_of(j)], 1);
  }

  // Both codes from bit `POSITION` of a half, under the exponent of 1024.
  template <int POSITION>
  METAL_FUNC half2 placed(int j) const thread {
    constexpr uint MASK = (((1u << BITS) - 1) << POSITION) * 0x10001u;
    if (BITS == 8) {
      return as_type<half2>(bytes_over(words[word_of(j)], j % 2));
    }
    uint word = j < WHOLE + SHARED ? words[word_of(j)] : spare[spare_of(j)];
    int at = j < WHOLE + SHARED ? field_of(j) * BITS : 1;
    word = at > POSITION ? word >> (at > POSITION ? at - POSITION : 0)
                         : word << (at > POSITION ? 0 : POSITION - at);
    return as_type<half2>(bits_over(word, MASK, 0x64006400u));
  }

 private:
  static METAL_FUNC constexpr int word_of(int j) {
    return j < WHOLE ? j / FIELDS : j < WHOLE + SHARED ? WORDS : 0;
  }
  static METAL_FUNC constexpr int field_of(int j) {
    return j < WHOLE ? j % FIELDS : j - WHOLE;
  }
  static METAL_FUNC constexpr int spare_of(int j) {
    return j < WHOLE + SHARED ? 0 : j - WHOLE - SHARED;
  }

  METAL_FUNC void take_spare_of_six(const thread uint (&pairs)[3]) thread {
    UNROLL
    for (int r = 0; r < SPARE; r++) {
      uint code = 0;
      UNROLL
      for (int j = 0; j < 3; j++) {
        code |= spare_piece<BITS>(pairs[j], j, r);
      }
      spare[r] = code;
    }
  }
};
