"""What the TurboQuant kernels are told by Python: constants, and the parameters of a layout.

The text is part of each of them, with that of `paged.constants_header`.
`kernels/turboquant/constants.h` is a copy of it, for editors and
Metal's own compiler; a test compares the two. After a change:

    python -m vllm_metal.metal_kernel_backend.turboquant.constants_header
"""

import textwrap

from vllm_metal.metal_kernel_backend.kernel_library import KERNELS
from vllm_metal.metal_kernel_backend.paged.constants_header import BEGINNING, declared
from vllm_metal.metal_kernel_backend.turboquant.bitpack import CHUNK
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    GROUP_SIZE,
    LEVEL_BASE,
    LEVEL_SCALE_FACTORS,
    LEVEL_UNIT,
    NUM_LEVELS,
    SCALE_FACTORS,
)
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import TRIED_LEVELS
from vllm_metal.metal_kernel_backend.turboquant.layout import (
    MAX_HEAD_SIZE,
    MIN_POWER,
    ODD_FACTORS,
    PageLayout,
)
from vllm_metal.metal_kernel_backend.turboquant.quantizer import (
    COORDINATE_LIMIT,
    MAX_SCALE,
    NAN_BITS,
)

HEADER = "turboquant/constants.h"
"""The copy, in `kernels/`."""

CODEBOOK_FACTORS = 4
"""Where the candidate scales begin in a codebook array, behind the polynomial's coefficients."""

CODEBOOK_MIDPOINTS = 16
"""Where the positive midpoints begin in a codebook array."""

[NUM_CANDIDATES] = {len(factors) for factors in (*SCALE_FACTORS.values(), LEVEL_SCALE_FACTORS)}
"""Scales that the quantisers try."""

CONSTANT_VALUES = {
    "CHUNK": CHUNK,
    "GROUP_SIZE": GROUP_SIZE,
    "NUM_LEVELS": NUM_LEVELS,
    "LEVEL_BASE": LEVEL_BASE,
    "LEVEL_UNIT": LEVEL_UNIT,
    "TRIED_LEVELS": TRIED_LEVELS,
    "NUM_CANDIDATES": NUM_CANDIDATES,
    "COORDINATE_LIMIT": COORDINATE_LIMIT,
    "MAX_SCALE": MAX_SCALE,
    "NAN_BITS": NAN_BITS,
    "CODEBOOK_FACTORS": CODEBOOK_FACTORS,
    "CODEBOOK_MIDPOINTS": CODEBOOK_MIDPOINTS,
    "MAX_HEAD_SIZE": MAX_HEAD_SIZE,
    "MIN_POWER": MIN_POWER,
    "MAX_ODD_FACTOR": max(ODD_FACTORS),
}

LAYOUT_PARAMETERS = [name for name, _ in PageLayout.of("q8_0", "q3_0", 64, 1, 8).template()]
"""Names of what a kernel is compiled for, in the order of `PageLayout.template`."""


def constants_header() -> str:
    """The text of `HEADER`."""
    return "\n".join(
        [
            BEGINNING,
            declared(CONSTANT_VALUES),
            _macro("PAGE_LAYOUT_PARAMETERS", [f"int {name}" for name in LAYOUT_PARAMETERS]),
            _macro("PAGE_LAYOUT_ARGUMENTS", LAYOUT_PARAMETERS),
        ]
    )


def _macro(name: str, words: list[str]) -> str:
    """A definition on several lines. Spaces within a word stay where they are."""
    lines = textwrap.wrap(", ".join(word.replace(" ", "~") for word in words), 94)
    return f"#define {name} \\\n  " + " \\\n  ".join(lines).replace("~", " ") + "\n"


if __name__ == "__main__":
    (KERNELS / HEADER).write_text(constants_header(), encoding="ascii")
