"""Which operation of MLX kills the process? Each case runs in a process of its own.

    python benchmarks/gpu/crashing_operations.py [NAME ...]      all cases, or those of these names
    python benchmarks/gpu/crashing_operations.py --list

On MLX CUDA a tiny deepseek_v3 dies of SIGFPE, an integer division by zero, when its decode step is
traced. The cases come in four kinds: operations on arrays without elements, fused by `mx.compile`
and not; the operations of that model that a Llama does not have, traced; its modules, traced; and
the whole step. A process that dies prints the stack of libmlx, so that the last lines name the
function. Needs MLX and mlx-lm; for the modules and the step, this repository as the current folder.
Takes about ten seconds a case where MLX compiles its kernels for the first time.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
from operation_cases import CASES

SECONDS = 120


def show_stack_of_fatal_signals():
    """The C stack on standard error, then the end of the process; returns what must be kept."""
    libc = ctypes.CDLL(None)

    def handler(number: int) -> None:
        frames = (ctypes.c_void_p * 64)()
        libc.backtrace_symbols_fd(frames, libc.backtrace(frames, 64), 2)
        os._exit(128 + number)

    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    for number in (signal.SIGFPE, signal.SIGSEGV, signal.SIGABRT, signal.SIGILL):
        libc.signal(number, ctypes.cast(kept, ctypes.c_void_p))
    return kept


def outcome(code: int) -> str:
    """What an exit code means; a death by signal is -N here and 128 + N after the handler."""
    number = -code if code < 0 else code - 128
    if code and number in {s.value for s in signal.Signals}:
        return f"DIED of {signal.Signals(number).name}"
    return "ok" if code == 0 else f"failed with exit code {code}"


def run_apart(name: str) -> bool:
    """Runs a case in a process; prints what became of it, and its last words if it failed."""
    started = time.perf_counter()
    command = [sys.executable, "-s", __file__, "--inside", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        told, words = outcome(result.returncode), result.stderr
    except subprocess.TimeoutExpired as error:
        told, words = f"did not end in {SECONDS} s", (error.stderr or b"").decode()
    print(f"{name:45} {told} ({time.perf_counter() - started:.0f} s)", flush=True)
    if told != "ok":
        lines = words.splitlines()
        shown = lines if len(lines) <= 60 else [*lines[:40], "...", *lines[-20:]]
        print("".join(f"    {line}\n" for line in shown), flush=True)
    return told == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--inside", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return 0
    if arguments.inside:
        kept = show_stack_of_fatal_signals()
        mx.eval(CASES[arguments.inside]() or [])
        mx.synchronize()
        return 0 if kept else 1
    print(f"MLX {mx.__version__}, {mx.default_device()}", flush=True)
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; --list prints all names")
    passed = [run_apart(name) for name in arguments.names or CASES]
    print(f"{passed.count(True)} of {len(passed)} cases passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
