"""How the decode kernel's work is cut to fit a GPU: rows of a simdgroup, splits of the tokens."""

from dataclasses import dataclass
from functools import lru_cache

from vllm_metal.metal_kernel_backend.gpu_cores import core_count
from vllm_metal.metal_kernel_backend.kernel_library import Target

DECODE_SIMDGROUPS = 4
"""Simdgroups of a threadgroup."""

RUNS_AT_ONCE = 4
"""Runs of neighbouring tokens that a simdgroup reads at a time at head size 128."""

MAX_SPLITS = 128


@dataclass(frozen=True)
class Gpu:
    """What the cut depends on."""

    cores: int
    max_rows: int
    """Query rows that a simdgroup serves at most, 1 to 8. Each takes 16 registers of 32 bits for
    its output."""
    run_tokens: int
    """Neighbouring tokens that a lane reads at a time, 2 or 4: 4 hides more latency, 2 needs fewer
    registers."""
    threadgroups_per_core: int
    """Threadgroups that a core holds at a time with up to 4 rows."""
    matrix_rows: int
    """Query rows of a KV head from which on the matrix form of decode is used."""
    tile_tokens: int
    """Tokens that a simdgroup of the matrix form reads at a time, 8 or 16."""

    @classmethod
    def of(cls, target: Target) -> "Gpu":
        """The GPU that `target` runs on.

        Apple GPUs have 96 to 128 registers a thread: 4 rows fit or nearly fit, 8 do not. A core
        holds 24 simdgroups whatever they need (docs/kernels.md, "Registers"). On NVIDIA 3
        threadgroups leave 168 registers a thread, and 2 leave 255, which is room for 8 rows.
        """
        if target.name == "metal":
            return cls(core_count(target), max_rows=4, run_tokens=2, threadgroups_per_core=6, matrix_rows=5, tile_tokens=8)
        return cls(core_count(target), max_rows=8, run_tokens=4, threadgroups_per_core=3, matrix_rows=1, tile_tokens=16)

    @property
    def split_step(self) -> int:
        """Tokens that a threadgroup reads at a time at head size 128; a split is a multiple."""
        return DECODE_SIMDGROUPS * RUNS_AT_ONCE * self.run_tokens

    def resident_threadgroups(self, rows: int, matrix: bool) -> int:
        """Threadgroups that a core holds at a time, for `rows` query rows of a simdgroup."""
        if matrix and self.tile_tokens == 16:
            return 4
        return self.threadgroups_per_core if rows <= 4 else 2


@dataclass(frozen=True)
class DecodePlan:
    """How the query rows of a KV head and the tokens of a request are cut."""

    rows: int
    """Query rows that one simdgroup serves."""
    tiles: int
    """Times `rows`, at least all query rows of a KV head."""
    split_tokens: int
    num_splits: int
    matrix: bool


def plan_decode(gpu: Gpu, query_rows: int, kv_heads: int, tokens: int) -> DecodePlan:
    """The plan of one decode step.

    Args:
        gpu: that runs it.
        query_rows: of a KV head: its query heads times the query tokens of a request.
        kv_heads: of all requests together.
        tokens: that the rows of the longest request see.
    """
    matrix = query_rows >= gpu.matrix_rows
    tiles = -(-query_rows // (8 if matrix else gpu.max_rows))
    rows = -(-query_rows // tiles)
    resident = gpu.cores * gpu.resident_threadgroups(rows, matrix)
    step = DECODE_SIMDGROUPS * gpu.tile_tokens if matrix else gpu.split_step
    cut = splits(tokens, kv_heads * tiles, resident, step)
    return DecodePlan(rows, tiles, *cut, matrix)


@lru_cache(maxsize=4096)
def splits(tokens: int, threadgroups: int, resident: int, step: int) -> tuple[int, int]:
    """(tokens of a split, splits) for the longest request, at most `MAX_SPLITS` splits.

    `threadgroups` are needed per split, `resident` of them run at a time, and a split is a multiple
    of `step` tokens. One wave that fills the GPU is best; where no number of splits gives one,
    about two and a half waves keep the ends even (measured on an H200, see docs/kernels.md).
    """
    steps = -(-max(tokens, 1) // step)
    count = resident // threadgroups
    if count * threadgroups < 0.9 * resident:
        count = round(2.6 * resident / threadgroups)
    split_steps = -(-steps // max(1, min(count, steps, MAX_SPLITS)))
    return split_steps * step, -(-steps // split_steps)
