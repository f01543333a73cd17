"""The host target as late as a GPU: a kernel runs when MLX evaluates what it returned.

`HostTarget` runs a kernel while its launch is built, so no test on it can find code that reads
what a kernel has not written yet. This target hands the same compiled programs to MLX as a
primitive of its own (lazy_launch.cpp): MLX orders it by the arrays that it binds, runs it on the
CPU's stream, traces it in `mx.compile`, and sees no write to an input, as on a GPU.

It is for tests alone: it needs a C++ compiler that shares MLX's standard library.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest

from vllm_metal.machine.cache_folder import cache_folder
from vllm_metal.metal_kernel_backend.host_target import (
    HostProgram,
    HostTarget,
    compiled,
    find_compiler,
)
from vllm_metal.metal_kernel_backend.kernel_library import Kernel, Run, Template

SOURCE = Path(__file__).with_name("lazy_launch.cpp")
COMPILER = find_compiler("g++") or (find_compiler("c++") if sys.platform == "darwin" else None)

needs_lazy_target = pytest.mark.skipif(
    COMPILER is None, reason="a primitive of MLX needs g++ (clang on a Mac)"
)

VALUE_OFFSET = 24
"""Bytes from the beginning of MLX's Python object to its C++ array: the reference count, the type,
and nanobind's own eight bytes, whose first four name this offset."""
DIRECT = 1 << 2
"""nanobind's flag, in the next four bytes, for a value that lies in the object itself."""


class LazyTarget(HostTarget):
    """`HostTarget`, run when MLX evaluates. `name` stays "host": the programs are the same."""

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        def run(
            inputs: Sequence[mx.array],
            template: Template,
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            inputs = [mx.contiguous(array) for array in inputs]
            outputs = [
                mx.zeros(tuple(shape), dtype)  # only its shape and type are used
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            launch = compiled(HostProgram.of(kernel, inputs, template, output_dtypes))
            groups = (ctypes.c_uint * 3)(*(g // t for g, t in zip(grid, threadgroup, strict=True)))
            _lazy_launch()(
                ctypes.cast(launch, ctypes.c_void_p),
                groups,
                ctypes.c_uint(threadgroup[0]),
                *_addresses(inputs),
                *_addresses(outputs),
            )
            return outputs

        return run


def _addresses(arrays: Sequence[mx.array]) -> tuple[ctypes.Array, ctypes.c_uint]:
    """Where the C++ arrays of these Python objects are, and how many."""
    return (ctypes.c_void_p * len(arrays))(*map(_address, arrays)), ctypes.c_uint(len(arrays))


def _address(array: mx.array) -> int:
    offset, flags = (ctypes.c_uint32 * 2).from_address(id(array) + VALUE_OFFSET - 8)
    if offset != VALUE_OFFSET or not flags & DIRECT:
        raise RuntimeError(
            f"MLX {mx.__version__} lays its Python objects out in another way than lazy_target.py "
            f"expects (offset {offset}, flags {flags:#x})"
        )
    return id(array) + VALUE_OFFSET


@cache
def _lazy_launch() -> Callable[..., None]:
    """`lazy_launch` of the C++ file, compiled against this MLX.

    Raises RuntimeError where it does not compile, or does not see the arrays that MLX made.
    """
    package = Path(mx.__file__).parent
    libraries = ["-L", str(package / "lib"), "-lmlx", f"-Wl,-rpath,{package / 'lib'}"]
    command = [COMPILER, *"-std=c++20 -O1 -shared -fPIC -x c++".split(), str(SOURCE)]
    command += ["-I", str(package / "include"), *libraries]
    text = "\0".join([*command, mx.__version__, SOURCE.read_text()])
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_folder() / "host-kernels" / f"lazy_launch_{key}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        built = path.with_suffix(f".{os.getpid()}.so")
        result = subprocess.run([*command, "-o", str(built)], text=True, capture_output=True)
        if result.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{result.stderr[:4000]}")
        built.replace(path)
    library = ctypes.CDLL(str(path))
    library.array_size.restype = ctypes.c_size_t
    known = mx.zeros((3, 7))
    if library.array_size(ctypes.c_void_p(_address(known))) != known.size:
        raise RuntimeError(f"{SOURCE.name} was compiled for another MLX than {mx.__version__}")
    library.lazy_launch.restype = None
    return library.lazy_launch
