"""Which of arithmetic and memory binds the decode kernel on Apple GPUs: an estimate, not a timing.

    python benchmarks/apple_budget.py

Operations are counted by hand from the files in `kernels/turboquant` for a lane that handles 16
elements of two tokens (32 pairs of a key's and a value's element), head size 128, 4 query heads per
KV head; and with 8 query heads, in the scalar form (two tiles of 4, each of which unpacks all keys
and values) and in the matrix form. Costs are cycles of an M1's ALU as measured by
github.com/philipturner/metal-benchmarks: multiply-adds, selects, additions and bitwise operations
1, shifts 4, exp2 4, shuffles 2; half operands of float multiply-adds are free and packed halves are
two operations. M1's costs are used for every chip. Bandwidth counts at 85 % of its peak.
"""

from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format

HEAD_SIZE, GROUP, TOKENS, CHUNK, LANES = 128, 4, 2, 16, 8

CHIPS = {  # 1e9 lane-operations per second, GB/s
    "M1": (1309, 68),
    "M1 Max": (5308, 400),
    "M4 Max": (8600, 546),
    "M5": (2050, 153),
}

PAIRS = (("q8_0", "q3_0"), ("q4_0", "q3_0"), ("q6_0", "q4_0"), ("q5_0", "q4_0"))


def unpacking(bits: int, terms: int) -> int:
    """Cycles to turn 16 codes of two tokens into halves."""
    fields, spare = 16 // bits, 16 % bits
    shifted = 0 if bits * fields <= 10 else bits
    rest = CHUNK - bits * fields
    bitwise = 2 * CHUNK + rest * bits
    shifts = 4 * (shifted + (bits + rest if spare else 0))
    doubled = bits
    polynomial = {1: 0, 2: 2, 3: 3}[terms]
    return bitwise + shifts + doubled + 2 * CHUNK * (1 + polynomial)


def cycles_per_pair(k_quant: str, v_quant: str) -> float:
    """Cycles of one lane for one pair, all query heads together."""
    key, value = key_format(k_quant), value_format(v_quant)
    products = 2 * GROUP * CHUNK * TOKENS
    scores = GROUP * TOKENS
    halves = GROUP * TOKENS // 4 * (2 + 2 + 2)  # the first step, two scores at a time
    fold = halves + (LANES // 2 - 1) * (2 + 2 + 1)
    softmax = 25
    addresses_and_loads = 40
    levels = TOKENS // 2 * (4 + 1 + 2 + 2 * GROUP) if key.has_levels(HEAD_SIZE) else 0
    total = sum(unpacking(form.bits, form.num_terms(HEAD_SIZE)) for form in (key, value))
    total += products + levels + scores + fold + softmax + addresses_and_loads
    return total / (CHUNK * TOKENS)


def matrix_cycles_per_pair(k_quant: str, v_quant: str) -> float:
    """The same in the matrix form, for up to 8 query heads: a lane handles 32 elements of a key and
    16 of the values of two tokens in each tile of 8. An 8 x 8 product is 16 multiply-adds of a
    lane, since these GPUs have no units of their own for it."""
    key, value = key_format(k_quant), value_format(v_quant)
    levels = key.has_levels(HEAD_SIZE)
    multiplies = 2 * HEAD_SIZE // 8 + int(levels)
    scores = 2 * (3 + 4 + 3)  # of one token for two rows: scale, exp2, compare and add
    scales = 12 + (14 if levels else 0)
    addresses_and_loads = 40
    total = sum(unpacking(form.bits, form.num_terms(HEAD_SIZE)) for form in (key, value))
    total += 16 * multiplies + scores + scales + addresses_and_loads
    return total / (CHUNK * TOKENS)


def main() -> None:
    print("8 query heads, cycles a pair: scalar form, matrix form")
    for pair in PAIRS:
        print(
            f"{'/'.join(pair):10} {2 * cycles_per_pair(*pair):6.1f} "
            f"{matrix_cycles_per_pair(*pair):6.1f}"
        )
    print(
        f"{'chip':7} {'formats':10} {'B/pair':>6} {'cycles':>6} {'by ALU':>7} {'by mem':>7} binds"
    )
    for chip, (operations, bandwidth) in CHIPS.items():
        for pair in PAIRS:
            key, value = key_format(pair[0]), value_format(pair[1])
            size = (key.vector_bytes(HEAD_SIZE) + value.vector_bytes(HEAD_SIZE)) / HEAD_SIZE
            cycles = cycles_per_pair(*pair)
            by_alu, by_memory = operations / cycles, 0.85 * bandwidth / size
            ideal = 0.85 * bandwidth / 4
            print(
                f"{chip:7} {'/'.join(pair):10} {size:6.2f} {cycles:6.1f} "
                f"{by_alu:6.0f}G {by_memory:6.0f}G "
                f"{'arithmetic' if by_alu < by_memory else 'memory':10} "
                f"{min(by_alu, by_memory) / ideal:.1f} x an ideal fp16 kernel ({ideal:.0f}G)"
            )


if __name__ == "__main__":
    main()
