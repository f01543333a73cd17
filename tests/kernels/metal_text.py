"""The text that MLX hands to Metal's compiler, and a stricter compiler for it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import (
    KERNELS,
    Kernel,
    MetalTarget,
    Run,
    Target,
)

SHIM = Path(__file__).parent / "metal_strict.h"

FLAGS = (
    "-std=c++14 -x c++ -nostdinc -nostdinc++ -Wall -Wextra -Wno-unused-parameter "
    "-Wno-unused-const-variable -Wno-unknown-attributes -Wno-ignored-attributes -Werror "
    "-Wconversion -Wno-sign-conversion -Wdouble-promotion"
).split()

THREADGROUP_BYTES = 32 << 10


class PrintingTarget(Target):
    """Metal, with the generated source on standard output. Launches inside `metal_text` only."""

    name = "metal"

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        run = MetalTarget().build(kernel)
        return lambda **arguments: run(verbose=True, **arguments)


def metal_text(launch: Callable[..., object], *arrays: mx.array) -> list[str]:
    """Exact sources of the kernels that `launch(*arrays)` would run, traced without a GPU."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(lambda _: None, launch, *arrays)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return re.findall(r"```\n(.*?)\n```", file.read().decode("ascii"), re.DOTALL)


def joined(sources: list[str]) -> list[str]:
    """A program for each kind of kernel: its part of the library once, each kernel once."""
    programs: dict[str, dict[str, None]] = {}
    for source in sources:
        head, kernel = _split(source)
        programs.setdefault(head, {})[kernel] = None
    return [head + "\n".join(kernels) for head, kernels in programs.items()]


def _split(source: str) -> tuple[str, str]:
    """The library's text, and the kernels generated after it."""
    start = source.rindex("\ntemplate <", 0, source.index("[[kernel]] void")) + 1
    return source[:start], source[start:]


def for_clang(source: str) -> str:
    """The same program where clang's C++ wants other words than Metal's.

    Threadgroup arrays of a kernel become static, with an assertion on their size; an explicit
    instantiation takes no attributes.
    """
    head, kernels = _split(source)
    kernels = re.sub(
        r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\]",
        "template",
        kernels,
        flags=re.MULTILINE,
    )
    array = r"^ *threadgroup \w+ (\w+)\[[^\]]*\];$"
    blocks = re.compile(rf"(?:{array}\n?)+", re.MULTILINE)

    def declare(match: re.Match) -> str:
        names = re.findall(array, match.group(), re.MULTILINE)
        total = " + ".join(f"sizeof({name})" for name in names)
        arrays = re.sub(r"^ *threadgroup", "  static threadgroup", match.group(), flags=re.M)
        limit = f'static_assert({total} <= {THREADGROUP_BYTES}, "threadgroup memory");'
        return f"{arrays.rstrip()}\n  {limit}\n"

    return head + blocks.sub(declare, kernels)


def compile_errors(source: str) -> str:
    """What clang says of a program, in strict C++14 with distinct address spaces; "" if nothing."""
    return _clang("-fsyntax-only", "-", input=source).stderr


def file_errors(file: Path) -> str:
    """The same of a file of the kernels as it stands, with its own includes."""
    allowed = "-Wno-pragma-once-outside-header"
    return _clang("-fsyntax-only", allowed, "-I", KERNELS, file).stderr


def compile_program(source: str, *flags: str) -> str:
    """What clang writes for a program with these flags. Raises RuntimeError if it has errors."""
    result = _clang(*flags, "-", input=source)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout


def _clang(*arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metal_stdlib").write_text(SHIM.read_text())
        (Path(folder) / "metal_simdgroup_matrix").write_text("#pragma once\n")
        command = [sys.executable, "-m", "ziglang", "clang", *FLAGS, "-I", folder, *arguments]
        return subprocess.run(command, input=input, text=True, capture_output=True)
