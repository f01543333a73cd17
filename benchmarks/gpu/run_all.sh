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
set -uo pipefail

python=${PYTHON:-python3}
pytest="$python -m pytest -q -p no:cacheprovider"
# A process that dies takes one test with it, and the next one goes on in another process.
apart="-n 1 --max-worker-restart 20"
engine() { echo "$python benchmarks/gpu/$1.py $MODEL --output $out/$1.jsonl"; }

# name, seconds, command
parts() {
  cat <<P
speed      300 $python benchmarks/gpu/attention.py --output $out/attention.json
prefill    120 $python benchmarks/gpu/prefill.py --output $out/prefill.json
memory     180 $python benchmarks/gpu/peak_memory.py
memcheck   180 compute-sanitizer --tool memcheck $python benchmarks/gpu/sanitize.py
racecheck  180 compute-sanitizer --tool racecheck $python benchmarks/gpu/sanitize.py
kernels    570 kernel_tests
doctor     300 doctor
crashes    570 $python benchmarks/gpu/crashing_operations.py
contract   300 $pytest tests/attention/test_backend.py
smoke      400 $python examples/serve_demo.py
greedy     400 $pytest $apart tests/e2e/test_greedy_tokens.py
kinds      570 $pytest $apart tests/e2e/test_models.py -k dense
kinds-tq   570 $pytest $apart tests/e2e/test_models.py -k turboquant
turboquant 570 $pytest $apart tests/e2e/test_turboquant.py
others     570 $pytest $apart tests/e2e/test_scheduling.py tests/e2e/test_sampling.py tests/e2e/test_refusals.py
model      200 $python benchmarks/gpu/random_model.py $MODEL
steps      570 $(engine engine_step)
first      570 $(engine first_token)
P
}

# 17 chosen instantiations and KERNEL_CASES random ones in each of fourteen processes, and all other
# tests of the launcher in one.
kernel_tests() {
  local tests="$pytest --noconftest tests/metal_kernel_backend/turboquant/test_launcher.py -k"
  local matrix=test_store_decode_and_dequantize cases
  export KERNEL_TARGET=cuda
  echo "others: $($tests "not $matrix" | tail -n 1)" &
  for cases in {10..23}; do
    echo "KERNEL_CASES=$cases: $(KERNEL_CASES=$cases $tests "$matrix" | tail -n 1)" &
  done
  wait
}

# Twice: the first run compiles the kernels, the second one finds them compiled.
doctor() {
  local code=0
  for run in 1 2; do
    SECONDS=0
    $python -m vllm_metal.cli doctor || code=$?
    echo "run $run: exit code $code, $SECONDS s"
  done
  $python -m vllm_metal.cli doctor --json > "$out/doctor.json" || code=$?
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
  parts
  exit
fi
out=${1:?usage: run_all.sh OUTPUT_FOLDER [PART ...], or --list}
shift
mkdir -p "$out"
MODEL=${MODEL:-$out/model}
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
