"""Counts the instructions of the decode kernel's inner loop, from compiled machine code.

    python benchmarks/gpu/instructions.py [--output counts.json]

Needs nvcc and cuobjdump (CUDA 12 or later) and no GPU: code for sm_90 is compiled and disassembled.
A pair is one element of a key and the same of its value; all query heads of the KV head are served.
Both forms of decode are counted. Instructions of branches that are rarely taken are left out: those
that move the softmax maximum, and those that hide tokens at the ends of a split.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

from cuda_program import Instantiation, cuda_program, decode_instantiation

from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE
from vllm_metal.metal_kernel_backend.turboquant.bitpack import CHUNK

CASES = [
    *((k, v, 4) for k in ("q8_0", "q6_0", "q5_0", "q4_0", "q3_0", "int8", "uint4")
      for v in ("q3_0", "q4_0")),
    ("q8_0", "q8_0", 4),
    *(("q8_0", "q3_0", heads) for heads in (1, 2, 8)),
]  # fmt: skip
"""Formats of keys and values, and query heads of a KV head."""

HEAD_SIZE = 128
FORMS = {"matrix": {}, "scalar": {"matrix": None}}
"""Options of the launcher for each form."""

KINDS = {
    "matrices": ("HMMA", "MOVM"),
    "multiply-add": ("FFMA", "HFMA2", "FMUL", "HMUL2", "FADD", "HADD2"),
    "bits and integers": ("LOP3", "SHF", "PRMT", "IADD3", "IMAD", "LEA", "VIADD", "ISETP", "SEL"),
    "lanes": ("SHFL", "VOTE", "FSEL"),
    "memory": ("LDG", "LDS", "LDC"),
}


def machine_code(made_for: Instantiation) -> tuple[list[tuple[int, str]], int]:
    """(address, instruction) of a kernel, and its registers."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "decode.cu", Path(folder) / "decode.cubin"
        source.write_text(cuda_program(made_for, "decode"))
        command = ["nvcc", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", binary, source]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        dump = subprocess.run([cuobjdump(), "--dump-sass", binary], capture_output=True, text=True)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", dump.stdout, re.MULTILINE)
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    return [(int(address, 16), text) for address, text in lines], registers


def inner_loop(code: list[tuple[int, str]]) -> list[str]:
    """The smallest backward branch around the half multiply-adds, without what a forward branch in
    it skips."""
    loops = []
    for address, text in code:
        target = branch_target(text)
        if target is not None and target < address:
            loops.append([line for line in code if target <= line[0] <= address])
    body = min((x for x in loops if sum("HFMA2" in text for _, text in x) >= 30), key=len)
    begin, end = body[0][0], body[-1][0]
    skipped = [
        (address, target)
        for address, text in body
        if (target := branch_target(text)) is not None and address < target <= end
    ]
    assert skipped, f"no rare branch between {begin:#x} and {end:#x}"
    return [text for at, text in body if not any(a < at < b for a, b in skipped)]


def branch_target(text: str) -> int | None:
    """Where an instruction branches to, if it does."""
    target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
    return int(target.group(1), 16) if target else None


def count(k_quant: str, v_quant: str, heads: int, form: str) -> dict:
    """Instructions of one lane for one pair of elements, by kind."""
    made_for = decode_instantiation((k_quant, v_quant), heads, HEAD_SIZE, **FORMS[form])
    code, registers = machine_code(made_for)
    names = Counter()
    for text in inner_loop(code):
        names[re.sub(r"^@!?U?P\d+ ", "", text).split()[0].split(".")[0]] += 1
    # elements of the tokens of a lane (scalar) or a simdgroup (matrix) that a lane handles
    held = HEAD_SIZE // SIMD_SIZE if form == "matrix" else CHUNK
    pairs = held * dict(made_for.template)["TOKENS"]
    kinds = {kind: sum(names[name] for name in KINDS[kind]) / pairs for kind in KINDS}
    total = sum(names.values()) / pairs
    kinds["other"] = total - sum(kinds.values())
    return {
        "form": form,
        "k_quant": k_quant,
        "v_quant": v_quant,
        "query_heads_per_kv_head": heads,
        "registers": registers,
        "instructions_per_pair": total,
        "kinds": kinds,
    }


def cuobjdump() -> str:
    """On the path, or the one that Triton carries."""
    if path := shutil.which("cuobjdump"):
        return path
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the counts as JSON")
    arguments = parser.parse_args()
    rows = []
    print(f"{'form':6} {'formats':12} {'G':>2} {'regs':>4} {'total':>6} {'/head':>6}  by kind")
    for form, case in product(FORMS, CASES):
        row = count(*case, form)
        rows.append(row)
        total, heads = row["instructions_per_pair"], row["query_heads_per_kv_head"]
        kinds = ", ".join(f"{kind} {each:.1f}" for kind, each in row["kinds"].items())
        name = f"{row['k_quant']}/{row['v_quant']}"
        print(
            f"{form:6} {name:12} {heads:2} {row['registers']:4} {total:6.1f} {total / heads:6.2f}"
            f"  {kinds}",
            flush=True,
        )
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(rows, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
