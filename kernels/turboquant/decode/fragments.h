// Products of small matrices that the lanes of a simdgroup hold together.
//
// A fragment is a matrix of 8 lines of 8 elements; lane l holds one pair of neighbouring elements,
// the `column(l)`-th of line `line(l)`. What lines and pairs are:
//
//   keys      a line is a token, a pair two elements of its key
//   values    a line is an element, a pair two neighbouring tokens
//   output    a line is an element, a pair two neighbouring query rows
//   scores, weights, queries    depend on the hardware: a weight is where its score is
//
// A step takes two fragments of keys, or of values, at a time.
#pragma once

#include "turboquant/arithmetic.h"

constant constexpr int FRAGMENT_TOKENS = 8;
constant constexpr int FRAGMENT_ROWS = 8;

#ifdef TENSOR_CORES

// 16 x 8 x 16 and 16 x 8 x 8 products, as NVIDIA's tensor cores have them (PTX, mma.sync). Scores
// are query rows by tokens: the upper 8 of the 16 rows are empty.
struct Fragments {
  static constant constexpr int SCORES = 4;      // floats of a lane in a fragment, 2 of them used
  static constant constexpr int SCORE_ROWS = 1;  // query rows of the two scores
  static constant constexpr int SCORE_TOKENS = 2;
  static constant constexpr int QUERY_REGISTERS = 32;  // words of queries that a lane may hold

  static METAL_FUNC int line(int lane) { return lane / 4; }
  static METAL_FUNC int column(int lane) { return lane % 4; }

  // Row and token of this lane's scores.
  static METAL_FUNC int score_row(int lane, int) { return line(lane); }
  static METAL_FUNC int first_token(int lane) { return 2 * column(lane); }

  // Which row, column of the keys and element of its pair the two halves of a query word are.
  static METAL_FUNC int query_row(int lane, int) { return line(lane); }
  static METAL_FUNC int query_column(int lane) { return column(lane); }
  static METAL_FUNC int query_part(int, int i) { return i; }

  // The lanes that share a row of scores, and which of them this is.
  static constant constexpr int ROW_LANES = 4;
  static METAL_FUNC int row_lane(int lane) { return column(lane); }

  static METAL_FUNC float row_max(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(1)));
    return max(x, simd_shuffle_xor(x, ushort(2)));
  }
  static METAL_FUNC float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(2));
  }

  // Factors of the output's two rows, from that of the scores' row.
  static METAL_FUNC void output_rows(
      const thread float (&scores)[SCORE_ROWS], thread float (&output)[2], int lane) {
    output[0] = simd_shuffle(scores[0], ushort(8 * column(lane)));
    output[1] = simd_shuffle(scores[0], ushort(8 * column(lane) + 4));
  }

  static METAL_FUNC void add_scores(
      thread float (&scores)[SCORES], half2 query_a, half2 query_b, half2 key_a, half2 key_b) {
    multiply_16x8x16(
        scores, as_type<uint>(query_a), 0u, as_type<uint>(query_b), 0u, as_type<uint>(key_a),
        as_type<uint>(key_b));
  }
  static METAL_FUNC void add_scores(thread float (&scores)[SCORES], half2 query, half2 key) {
    multiply_16x8x8(scores, as_type<uint>(query), 0u, as_type<uint>(key));
  }

  // Two fragments of the output, from those of 8 tokens or of 16.
  static METAL_FUNC void add_values(
      thread float (&output)[4], const thread half2 (&a)[1], const thread half2 (&b)[1],
      const thread half2 (&weights)[1]) {
    multiply_16x8x8(
        output, as_type<uint>(a[0]), as_type<uint>(b[0]), as_type<uint>(weights[0]));
  }
  static METAL_FUNC void add_values(
      thread float (&output)[4], const thread half2 (&a)[2], const thread half2 (&b)[2],
      const thread half2 (&weights)[2]) {
    multiply_16x8x16(
        output, as_type<uint>(a[0]), as_type<uint>(b[0]), as_type<uint>(a[1]), as_type<uint>(b[1]),
        as_type<uint>(weights[0]), as_type<uint>(weights[1]));
  }
};

#else

// 8 x 8 x 8 products of Metal's simdgroup matrices. Scores are tokens by query rows. Which lane
// holds which elements is not in Metal's specification; MLX's own attention relies on the same
// (mlx/backend/metal/kernels/steel/attn/mma.h).
struct Fragments {
  static constant constexpr int SCORES = 2;
  static constant constexpr int SCORE_ROWS = 2;
  static constant constexpr int SCORE_TOKENS = 1;
  static constant constexpr int QUERY_REGISTERS = 16;

  static METAL_FUNC int line(int lane) { return (lane / 16) * 4 + lane / 2 % 4; }
  static METAL_FUNC int column(int lane) { return lane / 8 % 2 * 2 + lane % 2; }

  static METAL_FUNC int score_row(int lane, int i) { return 2 * column(lane) + i; }
  static METAL_FUNC int first_token(int lane) { return line(lane); }

  static METAL_FUNC int query_row(int lane, int i) { return 2 * column(lane) + i; }
  static METAL_FUNC int query_column(int lane) { return line(lane) / 2; }
  static METAL_FUNC int query_part(int lane, int) { return line(lane) % 2; }

  static constant constexpr int ROW_LANES = 8;
  static METAL_FUNC int row_lane(int lane) { return line(lane); }

  static METAL_FUNC float row_max(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(2)));
    x = max(x, simd_shuffle_xor(x, ushort(4)));
    return max(x, simd_shuffle_xor(x, ushort(16)));
  }
  static METAL_FUNC float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(2));
    x += simd_shuffle_xor(x, ushort(4));
    return x + simd_shuffle_xor(x, ushort(16));
  }

  static METAL_FUNC void output_rows(
      const thread float (&scores)[SCORE_ROWS], thread float (&output)[2], int) {
    output[0] = scores[0];
    output[1] = scores[1];
  }

  static METAL_FUNC void add_scores(
      thread float (&scores)[SCORES], half2 query_a, half2 query_b, half2 key_a, half2 key_b) {
    multiply(scores[0], scores[1], key_a, query_a);
    multiply(scores[0], scores[1], key_b, query_b);
  }
  static METAL_FUNC void add_scores(thread float (&scores)[SCORES], half2 query, half2 key) {
    multiply(scores[0], scores[1], key, query);
  }

  template <int GROUPS>
  static METAL_FUNC void add_values(
      thread float (&output)[4], const thread half2 (&a)[GROUPS], const thread half2 (&b)[GROUPS],
      const thread half2 (&weights)[GROUPS]) {
    UNROLL
    for (int n = 0; n < GROUPS; n++) {
      multiply(output[0], output[1], a[n], weights[n]);
      multiply(output[2], output[3], b[n], weights[n]);
    }
  }

 private:
  static METAL_FUNC void multiply(thread float& x, thread float& y, half2 a, half2 b) {
    simdgroup_matrix<half, 8, 8> left, right;
    simdgroup_matrix<float, 8, 8> sum;
    left.thread_elements()[0] = a.x;
    left.thread_elements()[1] = a.y;
    right.thread_elements()[0] = b.x;
    right.thread_elements()[1] = b.y;
    sum.thread_elements()[0] = x;
    sum.thread_elements()[1] = y;
    simdgroup_multiply_accumulate(sum, left, right, sum);
    x = sum.thread_elements()[0];
    y = sum.thread_elements()[1];
  }
};

#endif
