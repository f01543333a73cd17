#!/usr/bin/env bash
# Checks and measures the kernels on a CUDA machine, through MLX and CuPy.
#
#   usage: benchmarks/gpu/run_all.sh OUTPUT_FOLDER
#
# Needs Python with MLX (CUDA), mlx-lm, CuPy, PyTorch and pytest, a CUDA toolkit, and this repository
# as the current folder. Takes about nine minutes.
set -uo pipefail
out=${1:?usage: run_all.sh OUTPUT_FOLDER}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
{
  echo "== speed"
  python3 benchmarks/gpu/attention.py --output "$out/attention.json"
  echo "== prefill over a compressed context"
  python3 benchmarks/gpu/prefill.py --output "$out/prefill.json"
  echo "== peak memory of a model"
  python3 benchmarks/gpu/peak_memory.py
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" python3 benchmarks/gpu/sanitize.py
  done
  export KERNEL_TARGET=cuda
  tests="python3 -m pytest -q --noconftest -p no:cacheprovider
    tests/metal_kernel_backend/turboquant/test_launcher.py -k"
  matrix=test_store_decode_and_dequantize
  echo "== the kernel tests on the GPU: 17 chosen instantiations and KERNEL_CASES random ones in"
  echo "== each of fourteen processes, and all other tests in one"
  echo "others: $($tests "not $matrix" | tail -n 1)" &
  for cases in {10..23}; do
    echo "KERNEL_CASES=$cases: $(KERNEL_CASES=$cases $tests "$matrix" | tail -n 1)" &
  done
  wait
} 2>&1 | tee "$out/run.txt"
