// Written by constants_header.py, from what Python holds: edit it there.
#pragma once

#include <metal_stdlib>

constant constexpr int SIMD_SIZE = 32;
constant constexpr int TOKEN_WORDS = 8;
constant constexpr int BLOCK_SIZE_STEP = 8;

// Members are explained in parameters.py.
struct StoreParameters {
  int num_tokens;
};

struct DecodeParameters {
  int split_tokens;
  int num_splits;
  int window;
  int max_blocks;
  float scale;
  float softcap;
};

struct ReadParameters {
  int first_token;
  int num_tokens;
  int first_head;
};
