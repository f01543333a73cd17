"""What clang's optimiser leaves of a kernel in the memory of a thread.

A variable that the optimiser keeps in memory is an `alloca` of LLVM's text, which Metal's compiler
makes on its way, too. Arrays become registers where every index into them is known when the kernel
is compiled. One index that is not, and the whole array stays in memory: a GPU then loads and stores
what it should add.
"""

import re

from tests.kernels.metal_text import compile_program, for_clang

FLAGS = "-w -O2 -S -emit-llvm -o - -ffp-contract=off -fno-vectorize -fno-slp-vectorize".split()


def left_in_memory(program: str) -> list[list[str]]:
    """For each kernel of a `joined` program, the types of the variables that are no registers."""
    text = compile_program(for_clang(program), *FLAGS)
    functions = re.findall(
        r"^define [^\n]*@(\w+)\([^\n]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE
    )
    kernels = [body for name, body in functions if "custom_kernel_" in name]
    assert len(kernels) == program.count("[[kernel]] void")
    return [re.findall(r" = alloca ([^,\n]+)", body) for body in kernels]
