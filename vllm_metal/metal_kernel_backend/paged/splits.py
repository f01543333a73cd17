"""How the decode kernel's work is cut to fit a GPU: rows of a simdgroup, splits of the tokens."""

from dataclasses import dataclass
from functools import lru_cache

from vllm_metal.metal_kernel_backend.gpu_cores import core_count
from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE, Target

DECODE_SIMDGROUPS = 4
"""Simdgroups of a threadgroup."""

MAX_SPLITS = 128

TILE_ROWS = 8
"""Query rows that a simdgroup of the matrix form serves."""


@dataclass(frozen=True)
class Gpu:
    """What the cut depends on."""

    cores: int
    max_rows: int
    """Query rows that a simdgroup serves at most, 1 to 8. Each takes `lane_elements` registers of
    32 bits for its output."""
    run_tokens: int
    """Neighbouring tokens that a lane reads at a time, 2 or 4: 4 hides more latency, 2 needs fewer
    registers."""
    threadgroups_per_core: int
    """Threadgroups that a core holds at a time with up to 4 rows."""
    threadgroups_of_many_rows: int
    """The same with 5 to 8 rows."""
    lane_elements: int
    """Elements of a key or value that a lane holds, and sums that it keeps of each row."""
    one_split_tokens: int = 0
    """Tokens up to which a request is not split."""

    @classmethod
    def of(cls, target: Target, lane_elements: int) -> "Gpu":
        """The GPU that `target` runs on.

        Apple GPUs have 96 to 128 registers a thread: 4 rows fit or nearly fit, 8 do not. A core
        holds 24 simdgroups whatever they need (docs/kernels.md, "Registers"). On NVIDIA 2, 3 and 4
        threadgroups leave 255, 168 and 128 registers a thread: with 16 elements a lane 4 rows need
        168, with 8 elements 4 rows need 128 and 8 rows 168.

        A short request is one split, though that leaves cores idle: a second launch for merge would
        take the GPU about as long as the tokens, and the host, which bounds such steps, as long as
        the first.
        """
        cores = core_count(target)
        if target.name == "metal":
            return cls(cores, 4, 2, 6, 6, lane_elements, 256)
        return cls(cores, 8, 4, *((3, 2) if lane_elements > 8 else (4, 3)), lane_elements, 512)

    @property
    def split_step(self) -> int:
        """Tokens that a threadgroup reads at a time at head size 128; a split is a multiple."""
        runs_at_once = SIMD_SIZE * self.lane_elements // 128
        return DECODE_SIMDGROUPS * runs_at_once * self.run_tokens

    def resident_threadgroups(self, rows: int) -> int:
        """Threadgroups that a core holds at a time, for `rows` query rows of a simdgroup."""
        return self.threadgroups_per_core if rows <= 4 else self.threadgroups_of_many_rows


@dataclass(frozen=True)
class MatrixForm:
    """Where decode multiplies matrices (`kernels/paged/matrix.h`), and how it is cut there."""

    least_rows: int
    """Query rows of a KV head from which on. A tile has room for 8, however few there are."""
    tile_tokens: int
    """Tokens that a simdgroup reads at a time, 8 or 16."""
    threadgroups_per_core: int

    @classmethod
    def of(cls, target: Target, head_size: int) -> "MatrixForm | None":
        """That of a target, for keys and values of `head_size` elements at most.

        NVIDIA's tensor cores multiply for nothing, so the form serves any number of rows; 4
        threadgroups leave 128 registers a thread, 2 leave 255. Before M5, Apple GPUs multiply
        matrices on their ordinary units, 8 rows at the cost of 8: with 4 rows the other form costs
        less. Sums and queries of more than 128 elements would not fit their registers.
        """
        if target.name == "cuda":
            return cls(1, 16, 4) if head_size <= 128 else cls(1, 8, 2)
        return cls(5, 8, 6) if head_size <= 128 else None

    @property
    def split_step(self) -> int:
        """Tokens that a threadgroup reads at a time; a split is a multiple."""
        return DECODE_SIMDGROUPS * self.tile_tokens


FORM_OF_TARGET = MatrixForm(0, 0, 0)
"""Stands for that of the target."""


@dataclass(frozen=True)
class DecodePlan:
    """How the query rows of a KV head and the tokens of a request are cut."""

    rows: int
    """Query rows that one simdgroup serves."""
    tiles: int
    """Times `rows`, at least all query rows of a KV head."""
    split_tokens: int
    num_splits: int
    resident: int
    """Threadgroups that a core holds at a time."""
    matrix: MatrixForm | None
    """The matrix form, where it runs."""


def plan_decode(
    gpu: Gpu, query_rows: int, kv_heads: int, tokens: int, matrix: MatrixForm | None = None
) -> DecodePlan:
    """The plan of one decode step.

    Args:
        gpu: that runs it.
        query_rows: of a KV head: its query heads times the query tokens of a request.
        kv_heads: of all requests together.
        tokens: that the rows of the longest request see.
        matrix: where the pages have that form.
    """
    if matrix is not None and query_rows < matrix.least_rows:
        matrix = None
    tiles = -(-query_rows // (TILE_ROWS if matrix else gpu.max_rows))
    rows = -(-query_rows // tiles)
    if matrix:
        step, resident = matrix.split_step, matrix.threadgroups_per_core
    else:
        step, resident = gpu.split_step, gpu.resident_threadgroups(rows)
    if tokens <= gpu.one_split_tokens:
        cut = -(-max(tokens, 1) // step) * step, 1
    else:
        cut = splits(tokens, kv_heads * tiles, gpu.cores * resident, step)
    return DecodePlan(rows, tiles, *cut, resident, matrix)


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
