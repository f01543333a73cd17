"""Compiles every kernel with Metal's own compiler, in the text that MLX gives it. No GPU is needed.

    python scripts/compile_kernels.py OUT_FOLDER [--standard metal3.2]

Needs a Mac with Xcode, or another `xcrun` on the path. Each file of `kernels/` is compiled as it
stands, and each kernel of every format pair of the documentation and of dense pages as MLX would
compile it: after MLX's own `utils.h`, with template arguments. OUT_FOLDER gets the texts, what they
compiled to, a library that links them all, and `results.json`; what the compiler says is printed.
The exit code is 1 if anything does not compile.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.kernels.metal_text import PrintingTarget, joined, metal_text  # noqa: E402
from vllm_metal.metal_kernel_backend.dense.kernels import DenseLauncher  # noqa: E402
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout  # noqa: E402
from vllm_metal.metal_kernel_backend.kernel_library import KERNELS  # noqa: E402
from vllm_metal.metal_kernel_backend.paged import kernels as paged  # noqa: E402
from vllm_metal.metal_kernel_backend.paged.launcher import PageLauncher  # noqa: E402
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair  # noqa: E402
from vllm_metal.metal_kernel_backend.turboquant.launcher import (  # noqa: E402
    Launcher,
    LayerConstants,
)
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout  # noqa: E402
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS  # noqa: E402

OLDEST_STANDARD = "metal3.2"
"""What MLX asks for on macOS 15, the oldest system that is supported."""
HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (mx.float16, mx.bfloat16)
GROUPS = (1, 4, 8)
"""Query heads of a KV head."""
KV_HEADS, BLOCK_SIZE = 2, 16

UTILS = '#include "mlx/backend/metal/kernels/utils.h"\n'
"""What MLX puts in front of every kernel, from the headers in its package."""


Kind = FormatPair | mx.Dtype
"""Formats of keys and values, or the type of dense pages."""


@dataclass(frozen=True)
class Result:
    """One text and what became of it."""

    name: str
    ok: bool
    seconds: float
    messages: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--standard", default=OLDEST_STANDARD, help="language version")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    programs = {f"file {path.relative_to(KERNELS)}": path for path in kernel_files()}
    kinds: list[Kind] = [*DTYPES, *SHOWN_PAIRS]
    for kind in kinds:
        name = kind_name(kind)
        for i, text in enumerate(texts(kind)):
            path = args.out / f"{name.replace('/', '-').replace(' ', '-')}_{i}.metal"
            path.write_text(UTILS + text)
            programs[f"{name} {i}"] = path
    with ThreadPoolExecutor(args.jobs) as compilers:
        results = list(
            compilers.map(
                lambda name: compile_text(name, programs[name], args.out, args.standard), programs
            )
        )
    objects = [
        _object(path, args.out) for name, path in programs.items() if not name.startswith("file ")
    ]
    if all(result.ok for result in results):
        results.append(link(objects, args.out / "kernels.metallib"))
    report = {
        "system": platform.platform(),
        "compiler": _output("xcrun", "-sdk", "macosx", "metal", "--version"),
        "standard": args.standard,
        "mlx": version("mlx"),
        "results": [asdict(result) for result in results],
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        print(f"{'ok' if result.ok else 'FAILED':7} {result.name} ({result.seconds:.1f} s)")
        if result.messages:
            print(result.messages)
    failed = [result.name for result in results if not result.ok]
    print(f"{len(results) - len(failed)} of {len(results)} compiled as {args.standard}")
    return 1 if failed else 0


def kernel_files() -> list[Path]:
    """The files of `kernels/`; each includes what it needs."""
    return sorted(path for path in KERNELS.rglob("*") if path.suffix in (".h", ".metal"))


def kind_name(kind: Kind) -> str:
    """`q8_0/q3_0`, `dense float16`."""
    if isinstance(kind, mx.Dtype):
        return f"dense {str(kind).removeprefix('mlx.core.')}"
    return str(kind)


def texts(kind: Kind) -> list[str]:
    """One program for each kind of kernel, with all its instantiations for these pages."""
    found: list[str] = []
    for head_size in HEAD_SIZES:
        for dtype in (kind,) if isinstance(kind, mx.Dtype) else DTYPES:
            for group in GROUPS:
                found += launched(kind, head_size, dtype, group)
    return joined(found)


def launched(kind: Kind, head_size: int, dtype: mx.Dtype, group: int) -> list[str]:
    """The texts of a store, a decode, one with sinks and a soft-cap, and a read of tokens."""
    heads, size = KV_HEADS, head_size
    launcher: PageLauncher
    if isinstance(kind, mx.Dtype):
        page = BLOCK_SIZE * heads * 2 * size * kind.size
        dense = DenseLayout(kind, size, size, heads, BLOCK_SIZE, page)
        pages_shape, page_dtype = dense.pages_shape(4), kind
        launcher = DenseLauncher(dense, PrintingTarget(), num_cores=8)
    else:
        layout = PageLayout(*kind, size, size, heads, BLOCK_SIZE)
        pages_shape, page_dtype = layout.pages_shape(4), mx.uint16
        launcher = Launcher(layout, PrintingTarget(), num_cores=8)

    def step(
        pages: mx.array,
        new: mx.array,
        slots: mx.array,
        queries: mx.array,
        table: mx.array,
        lengths: mx.array,
        factors: mx.array,
        value_factors: mx.array,
        sinks: mx.array,
    ) -> tuple[mx.array, ...]:
        constants = paged.LayerConstants()
        if not isinstance(kind, mx.Dtype):
            constants = LayerConstants(factors, factors, factors, value_factors)
        token = launcher.store(pages, new, new, slots, constants)
        arguments = pages, queries, table, lengths, constants, 0.1, 40, token
        outputs = launcher.decode(*arguments), launcher.decode(*arguments, sinks, softcap=30.0)
        return *outputs, *launcher.read(pages, table[0], constants, 0, 3, token, dtype)

    return metal_text(
        step,
        mx.zeros(pages_shape, page_dtype),
        mx.zeros((8, heads, size), dtype),
        mx.zeros((8,), mx.int32),
        mx.zeros((8, 1, heads * group, size), dtype),
        mx.zeros((8, 8), mx.int32),
        mx.zeros((8,), mx.int32),
        mx.zeros((heads, size)),
        mx.zeros((size,)),
        mx.zeros((heads * group,)),
    )


def compile_text(name: str, source: Path, out: Path, standard: str) -> Result:
    """Compiles a file; its messages name warnings, too."""
    includes = ["-I", str(KERNELS), "-I", str(Path(mx.__file__).parent / "include")]
    command = ["metal", f"-std={standard}", "-x", "metal", "-Wall", *includes]
    return _run(name, [*command, "-c", str(source), "-o", str(_object(source, out))])


def link(objects: Sequence[Path], library: Path) -> Result:
    """Links what was compiled into one library."""
    return _run("library", ["metallib", *map(str, objects), "-o", str(library)])


def _object(source: Path, out: Path) -> Path:
    return out / f"{source.name}.air"


def _run(name: str, command: Sequence[str]) -> Result:
    started = time.perf_counter()
    result = subprocess.run(["xcrun", "-sdk", "macosx", *command], text=True, capture_output=True)
    messages = (result.stdout + result.stderr).strip()
    return Result(name, result.returncode == 0, time.perf_counter() - started, messages)


def _output(*command: str) -> str:
    result = subprocess.run(command, text=True, capture_output=True)
    return (result.stdout + result.stderr).strip()


if __name__ == "__main__":
    sys.exit(main())
