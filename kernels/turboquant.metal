// Attention straight over the compressed pages of a KV cache.
//
// A page is described in vllm_metal/metal_kernel_backend/turboquant/layout.py, the packing of its
// codes in bitpack.py, the numbers its codes stand for in formats.py and quantizer.py. Letters: B
// requests, H KV heads, G query heads of a KV head, Q query tokens of a request, R query rows (of
// the G * Q) that one simdgroup serves, D head size.
//
//   store       a simdgroup per new vector: rotate, quantise, pack, write into its page
//   decode      a threadgroup per (R rows of a KV head, split of the tokens, request): attention
//               of the rows over the split; keys and values are dequantised once for all rows
//   merge       a threadgroup per (query row, request): splits -> output
//   dequantize  a simdgroup per stored vector: a run of tokens of one request to plain K and V
//
// Decode and merge are in paged/, for pages of every kind; what is said there of compressed pages
// is in reader.h and output.h. This file is for editors and for Metal's own compiler:
//
//   xcrun -sdk macosx metal -std=metal3.2 -I kernels -c kernels/turboquant.metal -o turboquant.air
//
// To run a kernel, kernel_library.py expands the includes of its header into one text, as MLX does
// with its own, and MLX compiles that with a short body that declares threadgroup memory and calls
// the header's function (turboquant/kernels.py). Launchers are in paged/launcher.py. The language
// is MSL as C++14, in ASCII.

#include "turboquant/store.h"
#include "turboquant/reader.h"
#include "turboquant/matrix_reader.h"
#include "turboquant/output.h"
#include "turboquant/dequantize.h"
