// Attention over dense pages: keys and values as they are, in half, bfloat or float.
//
//   store   a simdgroup per new vector: convert and write into its page
//   decode  as for compressed pages (paged/decode.h), by the reader in dense/reader.h
//   merge   as for compressed pages (paged/merge.h)
//   gather  a simdgroup per two stored vectors: a run of tokens of one request, side by side
//
// This file is for editors and for Metal's own compiler, as turboquant.metal is.

#include "dense/store.h"
#include "dense/reader.h"
#include "dense/output.h"
#include "dense/gather.h"
