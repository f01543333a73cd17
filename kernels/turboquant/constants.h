// Written by constants_header.py, from what Python holds: edit it there.
#pragma once

#include <metal_stdlib>

constant constexpr int CHUNK = 16;
constant constexpr int GROUP_SIZE = 16;
constant constexpr int NUM_LEVELS = 16;
constant constexpr int LEVEL_BASE = 12;
constant constexpr float LEVEL_UNIT = 0.03125f;
constant constexpr int TRIED_LEVELS = 3;
constant constexpr int NUM_CANDIDATES = 5;
constant constexpr float COORDINATE_LIMIT = 16777216.0f;
constant constexpr float MAX_SCALE = 65504.0f;
constant constexpr int NAN_BITS = 32256;
constant constexpr int CODEBOOK_FACTORS = 4;
constant constexpr int CODEBOOK_MIDPOINTS = 16;
constant constexpr int MAX_HEAD_SIZE = 512;
constant constexpr int MIN_POWER = 16;
constant constexpr int MAX_ODD_FACTOR = 7;

#define PAGE_LAYOUT_PARAMETERS \
  int NUM_KV_HEADS, int BLOCK_SIZE, int KEY_HEAD_SIZE, int VALUE_HEAD_SIZE, int KEY_BITS, \
  int VALUE_BITS, int KEY_TERMS, int VALUE_TERMS, int KEY_HAS_LEVELS, int KEY_HAS_BIAS, \
  int PAGE_BYTES, int HEAD_PAGE_BYTES, int VALUE_CODES_OFFSET, int KEY_LEVELS_OFFSET, \
  int KEY_SCALES_OFFSET, int KEY_BIASES_OFFSET, int VALUE_SCALES_OFFSET

#define PAGE_LAYOUT_ARGUMENTS \
  NUM_KV_HEADS, BLOCK_SIZE, KEY_HEAD_SIZE, VALUE_HEAD_SIZE, KEY_BITS, VALUE_BITS, KEY_TERMS, \
  VALUE_TERMS, KEY_HAS_LEVELS, KEY_HAS_BIAS, PAGE_BYTES, HEAD_PAGE_BYTES, VALUE_CODES_OFFSET, \
  KEY_LEVELS_OFFSET, KEY_SCALES_OFFSET, KEY_BIASES_OFFSET, VALUE_SCALES_OFFSET
