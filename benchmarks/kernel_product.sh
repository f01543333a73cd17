#!/usr/bin/env bash
# Runs the kernels on the CPU for the full product of formats, head sizes, blocks and groups.
#
#   usage: benchmarks/kernel_product.sh OUTPUT_FILE [FIRST_SLICE] [LAST_SLICE]
#
# 6,480 instantiations in 96 slices, one process for each core; about three hours of one core. Needs
# a C++ compiler. Each slice adds a line to the output: what pytest says of it.
set -euo pipefail
out=${1:?usage: kernel_product.sh OUTPUT_FILE [FIRST_SLICE] [LAST_SLICE]}
export OUT_FILE=$out OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
slice() {
  summary=$(KERNEL_PRODUCT=$1/96 python3 -m pytest -q --noconftest -p no:cacheprovider \
    tests/metal_kernel_backend/turboquant/test_launcher.py -k test_store_decode_and_dequantize | tail -n 1)
  echo "$1/96: $summary" >>"$OUT_FILE"
}
export -f slice
seq "${2:-0}" "${3:-95}" | xargs -P "$(nproc)" -I {} bash -c 'slice {}'
