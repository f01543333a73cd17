"""What the kernels of pages of any kind are told by Python: constants and the structs of launches.

The text is part of every kernel that is compiled. `kernels/paged/constants.h` is a copy of it, for
editors and Metal's own compiler; a test compares the two. After a change:

    python -m vllm_metal.metal_kernel_backend.paged.constants_header
"""

from collections.abc import Mapping

from vllm_metal.metal_kernel_backend.kernel_library import KERNELS, SIMD_SIZE
from vllm_metal.metal_kernel_backend.paged import parameters

HEADER = "paged/constants.h"
"""The copy, in `kernels/`."""

TOKEN_WORDS = 8
"""Words of the token that orders readers after a store."""

BLOCK_SIZE_STEP = 8
"""Tokens; the size of a block is a multiple."""

CONSTANT_VALUES: dict[str, int | float] = {
    "SIMD_SIZE": SIMD_SIZE,
    "TOKEN_WORDS": TOKEN_WORDS,
    "BLOCK_SIZE_STEP": BLOCK_SIZE_STEP,
}

BEGINNING = """// Written by constants_header.py, from what Python holds: edit it there.
#pragma once

#include <metal_stdlib>
"""
"""Of every header of constants."""


def declared(constants: Mapping[str, int | float]) -> str:
    """Their definitions. Whole numbers become `int`, others `float`."""
    return "".join(
        f"constant constexpr int {name} = {value};\n"
        if isinstance(value, int)
        else f"constant constexpr float {name} = {value!r}f;\n"
        for name, value in constants.items()
    )


def constants_header() -> str:
    """The text of `HEADER`."""
    structs = (parameters.STORE, parameters.DECODE, parameters.READ)
    return "\n".join(
        [
            BEGINNING,
            declared(CONSTANT_VALUES),
            "// Members are explained in parameters.py.",
            "\n".join(struct.declaration() for struct in structs),
        ]
    )


if __name__ == "__main__":
    (KERNELS / HEADER).write_text(constants_header(), encoding="ascii")
