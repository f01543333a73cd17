#!/usr/bin/env bash
# Checks and measures on a CUDA machine, part by part.
#
#   usage: benchmarks/gpu/run_all.sh OUTPUT_FOLDER [PART ...]      all parts, or these
#          benchmarks/gpu/run_all.sh --list
#
# Each part has a time limit and a log, OUTPUT_FOLDER/PART.log. OUTPUT_FOLDER/summary.txt gets a line
# for each: its exit code, the seconds it took, the last line of its log. No part stops another one;
# the exit code is 1 if any part failed.
#
# PYTHON is the interpreter, with its arguments if it needs some (default: python3). The parts of
# the kernels need MLX (CUDA), mlx-lm, CuPy, PyTorch with CUDA, pytest and a CUDA toolkit. The parts of
# the engine need vLLM, MLX (CUDA), mlx-lm, PyTorch and pytest with pytest-xdist, and smoke and greedy the
# demo model (`vllm-metal fetch-demo-model`); MODEL names a folder for a random model of 5.9 GB (default:
# OUTPUT_FOLDER/model). The current folder is this repository.
#
# MLX CUDA compiles the kernels of `mx.fast.cuda_kernel` again in each process. Where g++ is there, the
# parts of the engine and the doctor run with kept_kernels.cpp in front of NVRTC, which keeps them in
# OUTPUT_FOLDER/kernels, as macOS does with a Mac's.
set -uo pipefail

measure() { echo "$python benchmarks/gpu/$1.py $MODEL --output $out/$1.jsonl"; }

# name, seconds, command
parts() {
  cat <<P
speed      300 $python benchmarks/gpu/attention.py --output $out/attention.json
prefill    120 $python benchmarks/gpu/prefill.py --output $out/prefill.json
memory     180 $python benchmarks/gpu/peak_memory.py
memcheck   180 compute-sanitizer --tool memcheck $plain_python benchmarks/gpu/sanitize.py
racecheck  180 compute-sanitizer --tool racecheck $plain_python benchmarks/gpu/sanitize.py
kernels    570 kernel_tests
pairs      200 doctor_pairs
doctor     120 doctor
crashes    570 $python benchmarks/gpu/crashing_operations.py
contract   300 $pytest tests/attention/test_backend.py
smoke      400 $python examples/serve_demo.py
engine     580 engine_tests not nightly
nightly    900 engine_tests nightly
model      200 $python benchmarks/gpu/random_model.py $MODEL
steps      570 $(measure engine_step)
first      570 $(measure first_token)
P
}

# 17 chosen instantiations and KERNEL_CASES random ones in each of fourteen processes, and all other
# tests of the launcher in one.
kernel_tests() {
  local tests="$pytest --noconftest tests/metal_kernel_backend/turboquant/test_launcher.py -k"
  local matrix=test_store_decode_and_dequantize cases
  export KERNEL_TARGET=cuda
  echo "others: $($tests "not $matrix" | tail -n 1)" &
  echo "dense: $($pytest --noconftest tests/metal_kernel_backend/paged/test_launcher.py | tail -n 1)" &
  for cases in {10..23}; do
    echo "KERNEL_CASES=$cases: $(KERNEL_CASES=$cases $tests "$matrix" | tail -n 1)" &
  done
  wait
}

# Every pair in a process of its own, all at a time: right or wrong counts, times do not.
doctor_pairs() {
  local pair code=0 pids=()
  local pairs
  pairs=$($python -c 'from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS
print(*SHOWN_PAIRS)')
  for pair in $pairs; do
    OMP_NUM_THREADS=1 $python -m vllm_metal.cli doctor --formats "$pair" > "$out/doctor_${pair/\//-}.txt" &
    pids+=($!)
  done
  for pair in "${pids[@]}"; do wait "$pair" || code=1; done
  grep -h "^[a-z0-9_]*/[a-z0-9_]* .*wrong\|  OK$\|FAILED" "$out"/doctor_*.txt
  return $code
}

# The tests of the engine with this mark. A process that dies takes one test with it, and the next one
# goes on in another process.
engine_tests() {
  OMP_NUM_THREADS=1 $pytest -n 12 --max-worker-restart 20 -v --tb=short -m "$*" tests/e2e
}

# With the kernels that `doctor_pairs` has compiled.
doctor() {
  local code=0 started=$SECONDS
  $python -m vllm_metal.cli doctor || code=$?
  echo "exit code $code, $((SECONDS - started)) s"
  return $code
}

run_part() {
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  echo "== $name (at most $limit s): $*"
  if [ "$(type -t "$1")" = function ]; then
    timeout -k 20 "$limit" bash -c "$(declare -f "$1"); python='$python' pytest='$pytest' out='$out' $*" \
      > "$out/$name.log" 2>&1 || code=$?
  else
    timeout -k 20 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  fi
  local last
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1)
  [ $code -eq 0 ] || failed=1
  printf '%-11s %3d %5d s  %s\n' "$name" "$code" $((SECONDS - started)) "$last" | tee -a "$out/summary.txt"
}

if [ "${1:-}" = --list ]; then
  out=OUTPUT_FOLDER MODEL=${MODEL:-OUTPUT_FOLDER/model}
  plain_python=${PYTHON:-python3} python=$plain_python pytest="$python -m pytest"
  parts
  exit
fi
out=${1:?usage: run_all.sh OUTPUT_FOLDER [PART ...], or --list}
shift
mkdir -p "$out"
MODEL=${MODEL:-$out/model}
python=${PYTHON:-python3}
plain_python=$python
if g++ -std=c++17 -O2 -shared -fPIC -o "$out/kept_kernels.so" benchmarks/gpu/kept_kernels.cpp -ldl; then
  export KEPT_KERNELS=$(realpath "$out")/kernels
  mkdir -p "$KEPT_KERNELS"
  python="env LD_PRELOAD=$(realpath "$out")/kept_kernels.so $python"
fi
pytest="$python -m pytest -q -p no:cacheprovider"
# MLX multiplies float32 matrices with fewer bits unless it is told not to: tests compare in float32.
export PYTHONUNBUFFERED=1 MLX_ENABLE_TF32=${MLX_ENABLE_TF32:-0}
export PYTHONPATH="$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
failed=0
for name in "$@"; do
  parts | grep -q "^$name " || { echo "no part is called $name; see --list" >&2; exit 2; }
done
while read -r name limit command; do
  if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then
    # shellcheck disable=SC2086  # a command is words
    run_part "$name" "$limit" $command
  fi
done < <(parts)
exit $failed
