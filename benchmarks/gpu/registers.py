"""Registers and spills of the decode kernel under the bounds of Apple GPUs, as nvcc allocates them.

    python benchmarks/gpu/registers.py [--output registers.txt]

Needs nvcc (CUDA 12 or later) and no GPU. This is a stand-in for Apple's compiler: the same text,
with the two tokens that a lane reads at a time on Apple GPUs, is compiled for sm_90 with as many
registers of 32 bits as a thread has there. M1 and M2 have 128 and M5 has 126; M4 stops at 96, and
M3 is taken to do the same (docs/kernels.md names the sources). A spilt value is stored to memory
and loaded again in the inner loop.
"""

import argparse
import contextlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import mlx.core as mx
from cuda_program import Instantiation, Kind, cuda_program, decode_instantiation, kind_name

from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm

BOUNDS = (128, 96)
"""Registers of a thread."""

MATRIX = 0
"""In place of rows: the matrix form with 8 tokens at a time, as on Apple GPUs."""

CASES = [
    (kind, heads, rows)
    for kind in (
        *(("q8_0", "q3_0"), ("q4_0", "q3_0"), ("q6_0", "q4_0"), ("q5_0", "q4_0")),
        *(mx.float16, mx.bfloat16, mx.float32),
    )
    for heads, rows in ((1, 4), (2, 4), (3, 4), (4, 4), (8, 4), (4, 2), (8, 8), (8, MATRIX))
    if rows != MATRIX or not isinstance(kind, mx.Dtype)
]
"""Formats or the type of dense pages, query heads of a KV head, and the most query rows of a
simdgroup."""


def allocated(made_for: Instantiation, registers: int) -> tuple[int, int]:
    """Registers, and bytes of spilt values that a thread stores."""
    unbound = replace(made_for, resident=None)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "decode.cu"
        source.write_text(cuda_program(unbound, "decode"))
        command = ["nvcc", "-arch=sm_90", "-cubin", "-Xptxas", "-v", f"-maxrregcount={registers}"]
        result = subprocess.run(
            [*command, "-o", Path(folder) / "decode.cubin", source],
            check=True,
            capture_output=True,
            text=True,
        )
    used = re.search(r"Used (\d+) registers", result.stderr)
    spilt = re.search(r"(\d+) bytes spill stores", result.stderr)
    return int(used.group(1)), int(spilt.group(1))


def conditions() -> str:
    """The machine, the day and the versions that a table holds for."""
    nvcc = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release [^,]+, V([\d.]+)", nvcc)
    return (
        f"{date.today()}, {platform.system()} {platform.machine()}, nvcc {release.group(1)} for "
        f"sm_90, MLX {mx.__version__}; no GPU takes part"
    )


def table(cases: Sequence[tuple[Kind, int, int]]) -> None:
    """Prints the conditions and a row for each case."""
    print(conditions())
    print("pages          heads   rows   at most 128: used, spilt   at most 96: used, spilt")
    for kind, heads, most_rows in cases:
        options = {"max_rows": most_rows, "run_tokens": 2, "matrix": None}
        if most_rows == MATRIX:
            options = {"matrix": MatrixForm(1, 8, 6)}
        made_for = decode_instantiation(kind, heads, **options)
        rows = "matrix" if most_rows == MATRIX else dict(made_for.template)["R"]
        found = [allocated(made_for, registers) for registers in BOUNDS]
        columns = "".join(f"{used:16} {spilt:4} bytes" for used, spilt in found)
        print(f"{kind_name(kind):14} {heads:5} {rows:>6}{columns}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the table, instead of the terminal")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        output = (
            stack.enter_context(open(arguments.output, "w")) if arguments.output else sys.stdout
        )
        stack.enter_context(contextlib.redirect_stdout(output))
        table(CASES)


if __name__ == "__main__":
    main()
