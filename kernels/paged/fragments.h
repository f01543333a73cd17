// Products of small matrices that the lanes of a simdgroup hold together.
//
// A fragment is a matrix of 8 lines of 8 elements; lane l holds one pair of neighbouring elements,
// the `column(l)`-th of line `line(l)`. What lines and pairs are:
//
//   keys      a line is a token, a pair two elements of its key
//   scores    a line is a token, a pair two neighbouring query rows
//   values    a line is an element, a pair two neighbouring tokens
//   output    a line is an element, a pair two neighbouring query rows
//
// Fragments of queries and of weights are as the hardware wants them. Two fragments of keys, or of
// values, are multiplied at a time, for each of the GROUPS of 8 tokens that a lane has at hand.
#pragma once

#include <metal_simdgroup_matrix>

#include "paged/arithmetic.h"

constant constexpr int FRAGMENT_TOKENS = 8;
constant constexpr int FRAGMENT_ROWS = 8;

#ifdef TENSOR_CORES

// 16 x 8 x 16 and 16 x 8 x 8 products, as NVIDIA's tensor cores have them (PTX, mma.sync).
struct Fragments {
  static constant constexpr int QUERY_REGISTERS = 36;  // words of queries that a lane may hold

  static METAL_FUNC int line(int lane) { return lane / 4; }
  static METAL_FUNC int column(int lane) { return lane % 4; }

  // Half i of a word of queries: its row, its column of the keys, and which element of the pair.
  static METAL_FUNC int query_row(int lane, int) { return line(lane); }
  static METAL_FUNC int query_column(int lane) { return column(lane); }
  static METAL_FUNC int query_part(int, int i) { return i; }

  // Over the tokens of a fragment of scores.
  static METAL_FUNC float largest(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(4)));
    x = max(x, simd_shuffle_xor(x, ushort(8)));
    return max(x, simd_shuffle_xor(x, ushort(16)));
  }
  static METAL_FUNC float sum(float x) {
    x += simd_shuffle_xor(x, ushort(4));
    x += simd_shuffle_xor(x, ushort(8));
    return x + simd_shuffle_xor(x, ushort(16));
  }

  // Adds products with two words of queries, or with one.
  static METAL_FUNC void add_scores(
      thread float (&scores)[2][2], half2 query_a, half2 query_b, const thread half2 (&a)[2],
      const thread half2 (&b)[2]) {
    multiply_16x8x16(
        scores[0], scores[1], as_type<uint>(a[0]), as_type<uint>(a[1]), as_type<uint>(b[0]),
        as_type<uint>(b[1]), as_type<uint>(query_a), as_type<uint>(query_b));
  }
  static METAL_FUNC void add_scores(
      thread float (&scores)[2][2], half2 query, const thread half2 (&a)[2]) {
    multiply_16x8x8(
        scores[0], scores[1], as_type<uint>(a[0]), as_type<uint>(a[1]), as_type<uint>(query));
  }
  static METAL_FUNC void add_scores(
      thread float (&scores)[1][2], half2 query_a, half2 query_b, const thread half2 (&a)[1],
      const thread half2 (&b)[1]) {
    float none[2] = {0.0f, 0.0f};
    multiply_16x8x16(
        scores[0], none, as_type<uint>(a[0]), 0u, as_type<uint>(b[0]), 0u,
        as_type<uint>(query_a), as_type<uint>(query_b));
  }
  static METAL_FUNC void add_scores(
      thread float (&scores)[1][2], half2 query, const thread half2 (&a)[1]) {
    float none[2] = {0.0f, 0.0f};
    multiply_16x8x8(scores[0], none, as_type<uint>(a[0]), 0u, as_type<uint>(query));
  }

  // Weights to the places where they are multiplied, from those of their scores.
  static METAL_FUNC half2 placed(half2 weights) {
    return as_type<half2>(transpose_8x8(as_type<uint>(weights)));
  }

  // Adds to two fragments of the output, a and b.
  static METAL_FUNC void add_values(
      thread float (&output)[2][2], const thread half2 (&a)[2], const thread half2 (&b)[2],
      const thread half2 (&weights)[2]) {
    multiply_16x8x16(
        output[0], output[1], as_type<uint>(a[0]), as_type<uint>(b[0]), as_type<uint>(a[1]),
        as_type<uint>(b[1]), as_type<uint>(weights[0]), as_type<uint>(weights[1]));
  }
  static METAL_FUNC void add_values(
      thread float (&output)[2][2], const thread half2 (&a)[1], const thread half2 (&b)[1],
      const thread half2 (&weights)[1]) {
    multiply_16x8x8(
        output[0], output[1], as_type<uint>(a[0]), as_type<uint>(b[0]), as_type<uint>(weights[0]));
  }
};

#else

// 8 x 8 x 8 products of Metal's simdgroup matrices. Which lane holds which elements is not in
// Metal's specification; MLX's own attention relies on the same places
// (mlx/backend/metal/kernels/steel/attn/mma.h).
struct Fragments {
  static constant constexpr int QUERY_REGISTERS = 18;

  static METAL_FUNC int line(int lane) { return lane / 16 * 4 + lane / 2 % 4; }
  static METAL_FUNC int column(int lane) { return lane / 8 % 2 * 2 + lane % 2; }

  static METAL_FUNC int query_row(int lane, int i) { return 2 * column(lane) + i; }
  static METAL_FUNC int query_column(int lane) { return line(lane) / 2; }
  static METAL_FUNC int query_part(int lane, int) { return line(lane) % 2; }

  static METAL_FUNC float largest(float x) {
    x = max(x, simd_shuffle_xor(x, ushort(2)));
    x = max(x, simd_shuffle_xor(x, ushort(4)));
    return max(x, simd_shuffle_xor(x, ushort(16)));
  }
  static METAL_FUNC float sum(float x) {
    x += simd_shuffle_xor(x, ushort(2));
    x += simd_shuffle_xor(x, ushort(4));
    return x + simd_shuffle_xor(x, ushort(16));
  }

  template <int GROUPS>
  static METAL_FUNC void add_scores(
      thread float (&scores)[GROUPS][2], half2 query_a, half2 query_b,
      const thread half2 (&a)[GROUPS], const thread half2 (&b)[GROUPS]) {
    UNROLL
    for (int n = 0; n < GROUPS; n++) {
      multiply(scores[n], a[n], query_a);
      multiply(scores[n], b[n], query_b);
    }
  }
  template <int GROUPS>
  static METAL_FUNC void add_scores(
      thread float (&scores)[GROUPS][2], half2 query, const thread half2 (&a)[GROUPS]) {
    UNROLL
    for (int n = 0; n < GROUPS; n++) {
      multiply(scores[n], a[n], query);
    }
  }

  static METAL_FUNC half2 placed(half2 weights) { return weights; }

  template <int GROUPS>
  static METAL_FUNC void add_values(
      thread float (&output)[2][2], const thread half2 (&a)[GROUPS],
      const thread half2 (&b)[GROUPS], const thread half2 (&weights)[GROUPS]) {
    UNROLL
    for (int n = 0; n < GROUPS; n++) {
      multiply(output[0], a[n], weights[n]);
      multiply(output[1], b[n], weights[n]);
    }
  }

 private:
  static METAL_FUNC void multiply(thread float (&sum)[2], half2 a, half2 b) {
    simdgroup_matrix<half, 8, 8> left, right;
    simdgroup_matrix<float, 8, 8> total;
    left.thread_elements()[0] = a.x;
    left.thread_elements()[1] = a.y;
    right.thread_elements()[0] = b.x;
    right.thread_elements()[1] = b.y;
    total.thread_elements()[0] = sum[0];
    total.thread_elements()[1] = sum[1];
    simdgroup_multiply_accumulate(total, left, right, total);
    sum[0] = total.thread_elements()[0];
    sum[1] = total.thread_elements()[1];
  }
};

#endif
