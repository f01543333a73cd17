"""How many operations MLX puts into a Metal command buffer before it sends it to the GPU.

MLX sends one after 20 to 50 operations, or when the arrays bound since the last one pass some tens
of millions of elements. A decode step has thousands of small operations, and each command buffer
costs the GPU about 20 microseconds. With 1000 operations, others have measured decode 5 to 13 %
faster on M1 Ultra and M3 Ultra with models of small layers, no change with a large dense model, and
none or a loss on M5 (github.com/ml-explore/mlx/issues/4521, github.com/lablup/mlxcel/issues/353).

The limit on elements stays MLX's. MLX keeps what an operation read until its command buffer has
run, so that limit also bounds the memory of a step, which the memory plan measures
(github.com/vllm-project/vllm-metal/pull/586: a start failed with a limit of 2000).
"""

import os
import re
import subprocess
import sys

VARIABLE = "MLX_MAX_OPS_PER_BUFFER"
OPERATIONS = "1000"
LAST_GENERATION = 4
"""Of Apple's chips, M1 to M4, whose GPUs gain."""

SYSCTL = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
"""Prints the name of the chip, such as `Apple M1 Max`."""


def raise_operations_per_buffer() -> None:
    """Sets the limit of this process and its children on Macs before M5, unless the user set it.

    MLX reads it when it first uses the GPU.
    """
    if sys.platform != "darwin" or VARIABLE in os.environ:
        return
    generation = generation_of(_chip())
    if generation is not None and generation <= LAST_GENERATION:
        os.environ[VARIABLE] = OPERATIONS


def generation_of(chip: str) -> int | None:
    """The number in the name of a chip, 1 for `Apple M1 Max`; None where it is another name."""
    found = re.match(r"Apple M(\d+)\b", chip)
    return int(found.group(1)) if found else None


def _chip() -> str:
    """Name of the chip; empty where macOS does not tell."""
    try:
        return subprocess.run(SYSCTL, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
