// The query rows of a threadgroup, made ready for all of its tokens.
#pragma once

#include "paged/base.h"

// R rows in threadgroup memory, in the type that keys are multiplied in. A lane that holds a chunk
// of the keys reads that of a row in quarters of 4 elements, which lie side by side with those of
// its neighbours.
template <typename Query>
struct QueryRows {
  threadgroup Query* elements;  // [R, LANE_ELEMENTS / 4, LANES, 4]
  threadgroup float* scale;     // what the elements cannot hold, times the softmax scale
  threadgroup float* sum;       // of the row: what a key's bias is multiplied by
  threadgroup float* shift;     // its product with what stored keys lack, for soft-caps
};

// Which KV head, and which of the tiles of R rows.
struct QueryTile {
  int kv_head;
  int tile;
};

// Where row r of a tile is, among the queries [Q, H * G, Dk] of a request.
template <typename Layout, int G, int Q, int R>
struct QueryPlace {
  int head;
  bool real;  // false past the last row
  int begin;

  METAL_FUNC QueryPlace(QueryTile which, int r) {
    int row = which.tile * R + r;
    head = which.kv_head * G + row % G;
    real = row < G * Q;
    begin = (row / G * (Layout::num_kv_heads * G) + head) * Layout::key_head_size;
  }
};
