"""Checks and times the two forms of decode over compressed pages on an NVIDIA GPU.

    python benchmarks/gpu/decode_forms.py [--cuts] [--output results.json]

The scalar form and the matrix form read the same pages of random codes, head size 128, 8 KV heads.
Their outputs are compared with attention in float64 over what `read` makes of the pages, for one
request of a few thousand tokens, and with each other in every timed case. Times are those of
attention.py: device times, medians of CUDA graphs. `--cuts` also times other cuts of the matrix
form: tokens of a tile, threadgroups that a multiprocessor holds, and longer or shorter splits. Cut
for one multiprocessor, a short request is one split, and nothing is merged.
"""

import argparse
import json
from dataclasses import asdict

import cupy as cp
from attention import (
    HEAD_SIZE,
    KV_HEADS,
    Decode,
    dense_us,
    launcher_of,
    machine,
    write,
)
from cuda_program import kind_name
from cupy_target import CupyTarget
from graph_times import graph_us

from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm

SHAPES = ((8, 32_768), (32, 8_192), (1, 131_072), (1, 32_768), (1, 1_024), (1, 512))
GROUPS = (4, 8)
"""Query heads of a KV head."""
PAIRS = (("q8_0", "q3_0"), ("q4_0", "q3_0"))
CHECKED = (*PAIRS, ("q5_0", "q4_0"), ("q6_0", "q5_0"), ("q3_0", "q8_0"), ("uint4", "q2_0"))
TARGET = CupyTarget()
TOLERANCE = 2e-3
FORMS = {"scalar": {"matrix": None}, "matrix": {}}
CUTS = (MatrixForm(1, 16, 3), MatrixForm(1, 16, 5), MatrixForm(1, 8, 4), MatrixForm(1, 8, 6))


def expected(case: Decode) -> cp.ndarray:
    """Attention in float64 over what `read` gives, float64 [1, 1, heads, HEAD_SIZE]."""
    table = case.tables[0].reshape(-1)
    keys, values = case.cupy.read(
        case.pages, table, case.constants, 0, case.length, case.token, cp.float32
    )
    rows = case.queries.astype(cp.float64).reshape(KV_HEADS, -1, HEAD_SIZE)
    scores = rows @ keys.astype(cp.float64).swapaxes(1, 2) * HEAD_SIZE**-0.5
    weights = cp.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ values.astype(cp.float64)).reshape(1, 1, -1, HEAD_SIZE)


def difference(a: cp.ndarray, b: cp.ndarray) -> float:
    a, b = a.astype(cp.float64), b.astype(cp.float64)
    return float(cp.linalg.norm(a - b) / cp.linalg.norm(b))


def check() -> list[dict]:
    """Errors of both forms for each pair of formats; raises AssertionError for a large one."""
    rows = []
    for pair in CHECKED:
        case = Decode(pair, 1, 3_008, 1)
        case.cupy = launcher_of(case.layout, TARGET)
        right, errors = expected(case), {}
        for form, options in FORMS.items():
            case.cupy = launcher_of(case.layout, TARGET, **options)
            errors[form] = difference(case.launch(0), right)
        print(f"{kind_name(pair):10} errors {errors}", flush=True)
        assert max(errors.values()) < TOLERANCE, (pair, errors)
        rows.append({"kind": kind_name(pair), "errors": errors})
    return rows


def timed(case: Decode, options: dict) -> tuple[float, cp.ndarray]:
    """Microseconds of a decode with other options of the launcher, and what it gives."""
    case.cupy = launcher_of(case.layout, TARGET, **options)
    return graph_us(case.launch), case.launch(0)


def times(cuts: bool) -> list[dict]:
    """A row for each shape, number of heads and pair of formats."""
    rows = []
    for batch, length in SHAPES:
        sets = 4 if batch == 1 else 2
        for group in GROUPS:
            heads = KV_HEADS * group
            dense = min(dense_us(batch, length, sets, heads).values())
            cp.get_default_memory_pool().free_all_blocks()
            for pair in PAIRS:
                case = Decode(pair, batch, length, sets, heads)
                found = {form: timed(case, options) for form, options in FORMS.items()}
                off = difference(found["matrix"][1], found["scalar"][1])
                assert off < TOLERANCE, off
                row = {
                    "batch": batch,
                    "context": length,
                    "heads": group,
                    "kind": kind_name(pair),
                    "torch_us": dense,
                    **{f"{form}_us": us for form, (us, _) in found.items()},
                    "difference": off,
                }
                print(
                    f"{batch:3} x {length:7} G {group} {row['kind']:10} fp16 {dense:6.1f} us, "
                    + ", ".join(f"{f} {us:6.1f} {us / dense:.2f}x" for f, (us, _) in found.items())
                    + f", differ {off:.0e}",
                    flush=True,
                )
                if cuts and batch > 1 and group == 4:
                    for cut in CUTS:
                        us, _ = timed(case, {"matrix": cut})
                        print(f"      {asdict(cut)}: {us:6.1f} us", flush=True)
                if cuts and batch == 1:
                    for cores in (33, 66, 264) if length > 1_024 else (1, 16, 33, 66):
                        us, _ = timed(case, {"num_cores": cores})
                        print(f"      cut for {cores} multiprocessors: {us:6.1f} us", flush=True)
                rows.append(row)
                del case, found
                cp.get_default_memory_pool().free_all_blocks()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", action="store_true", help="time other cuts, too")
    parser.add_argument("--output", help="where to write the results as JSON")
    arguments = parser.parse_args()
    results = {"machine": machine()}
    print(json.dumps(results), flush=True)
    results |= {"errors": check(), "times": times(arguments.cuts)}
    write(results, arguments.output)


if __name__ == "__main__":
    main()
