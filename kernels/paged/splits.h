// Which tokens the rows of a request see, and how they are split among threadgroups.
#pragma once

#include "paged/base.h"

struct Splits {
  int seq_len;       // tokens of the request, its Q query tokens included
  int first;         // first token that any row sees, rounded down to a multiple of a block's step
  int split_tokens;  // tokens of a split

  METAL_FUNC Splits(const constant DecodeParameters& decode, int seq_len, int num_queries)
      : seq_len(seq_len), split_tokens(decode.split_tokens) {
    int hidden = seq_len - num_queries + 1 - decode.window;  // a window of 0: all are seen
    first = decode.window > 0 && hidden > 0 ? hidden & ~(BLOCK_SIZE_STEP - 1) : 0;
  }

  // How many splits have tokens.
  METAL_FUNC int used() const thread {
    return seq_len > 0 ? (seq_len - first + split_tokens - 1) / split_tokens : 0;
  }
};
