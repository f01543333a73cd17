#!/usr/bin/env bash
# Checks and measures the kernels on a CUDA machine, through MLX and CuPy.
#
#   usage: benchmarks/gpu/run_all.sh OUTPUT_FOLDER
#
# Needs Python with MLX (CUDA), mlx-lm, CuPy, PyTorch and pytest, a CUDA toolkit, and this repository
# as the current folder. Takes about five minutes.
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
  echo "== the kernel tests on the GPU, with ${KERNEL_CASES:=15} random instantiations"
  export KERNEL_CASES
  KERNEL_TARGET=cuda python3 -m pytest -q --noconftest -p no:cacheprovider \
    tests/metal_kernel_backend/turboquant/test_launcher.py
} 2>&1 | tee "$out/run.txt"
