"""The kernels against the codec (bytes) and the oracle (attention): on the CPU, or on a GPU.

KERNEL_TARGET=cuda or metal runs the same tests there; the codec stays on the CPU, whose rounding
defines the bytes.
"""

import os
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs, reference
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import CudaTarget, MetalTarget
from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, Quantized, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import SlotLayout

TARGETS = {"host": HostTarget, "cuda": CudaTarget, "metal": MetalTarget}
TARGET = TARGETS[os.environ.get("KERNEL_TARGET", "host")]()
DEVICE = mx.cpu if TARGET.name == "host" else mx.gpu

mx.set_default_device(mx.cpu)

TOLERANCE = 3e-3
"""Largest |kernel - oracle| / |oracle| of an output: keys and queries are halves in the kernel."""


@dataclass(frozen=True)
class Case:
    """One instantiation: formats, head size, KV heads, block size, query heads per KV head."""

    k_quant: str = "q8_0"
    v_quant: str = "q3_0"
    head_size: int = 64
    num_kv_heads: int = 2
    block_size: int = 16
    group: int = 4
    dtype: mx.Dtype = mx.float16
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("mlx.core.")
        return (
            f"{self.k_quant}/{self.v_quant}-D{self.head_size}-H{self.num_kv_heads}"
            f"-block{self.block_size}-G{self.group}-{kind}"
        )


CASES = [
    Case("q8_0", "q3_0", 128, 2, 16, 4),
    Case("q8_0", "q8_0", 64, 3, 16, 3, mx.float32),
    Case("q6_0", "q4_0", 80, 1, 8, 6, mx.bfloat16, {"max_rows": 4}),
    Case("q5_0", "q2_0", 96, 2, 32, 1),
    Case("q4_0", "q3_0", 256, 1, 16, 8),
    Case("q3_0", "q5_0", 112, 1, 16, 2, mx.bfloat16, {"run_tokens": 2}),
    Case("q2_0", "q6_0", 64, 1, 8, 12),
    Case("int8", "q4_0", 160, 1, 16, 2, mx.float16, {"run_tokens": 2}),
    Case("int4", "q3_0", 32, 2, 32, 4),
    Case("int2", "q2_0", 128, 1, 16, 8, mx.float16, {"max_rows": 4, "run_tokens": 2}),
    Case("uint8", "q5_0", 64, 1, 16, 1),
    Case("uint4", "q6_0", 192, 1, 16, 2),
    Case("uint2", "q8_0", 128, 1, 8, 1, mx.float32),
]
"""Every format, and every head size, block size, group and type, in one case or another."""


def random_cases(count: int) -> list[Case]:
    """Cases drawn from the whole product, the same for the same count."""
    rng = np.random.default_rng(count)

    def one(values):
        return values[rng.integers(len(values))]

    return [
        Case(
            one(list(KEY_FORMATS)),
            one(list(VALUE_FORMATS)),
            one([64, 80, 96, 112, 128, 160, 192, 256]),
            one([1, 2, 3]),
            one([8, 16, 32]),
            one([1, 2, 4, 6, 8, 12]),
            one([mx.float16, mx.bfloat16, mx.float32]),
            {"max_rows": one([1, 2, 4, 8]), "run_tokens": one([2, 4])},
        )
        for _ in range(count)
    ]


ALL_CASES = CASES + random_cases(int(os.environ.get("KERNEL_CASES", "0")))
"""KERNEL_CASES=200 adds as many random instantiations, at about five seconds each."""


class Stored:
    """Requests whose keys and values have been stored through the kernel."""

    def __init__(self, case: Case, lengths: list[int], seed: int = 0, keys=None, fill: int = 0):
        rng = np.random.default_rng(seed)
        self.case, self.lengths = case, lengths
        heads, size = case.num_kv_heads, case.head_size
        layout = SlotLayout.of(case.k_quant, case.v_quant, size, heads, case.block_size)
        self.layout = layout
        centre = rng.standard_normal((heads, size)).astype(np.float32)
        multiplier = np.exp(0.2 * rng.standard_normal((heads, size))).astype(np.float32)
        self.key_codec = KeyCodec(layout.key_format, centre, multiplier)
        self.value_codec = ValueCodec(layout.value_format, size)
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
        self.launcher = Launcher(layout, TARGET, **case.options)
        per_request = max(-(-length // case.block_size) for length in lengths)
        num_blocks = len(lengths) * per_request + 1
        self.table = 1 + rng.permutation(num_blocks - 1).reshape(len(lengths), per_request)
        self.pages = mx.full(layout.pages_shape(num_blocks), fill, mx.uint16)
        mx.eval(self.pages)
        self.slots = [
            self.table[i][np.arange(n) // case.block_size] * case.block_size
            + np.arange(n) % case.block_size
            for i, n in enumerate(lengths)
        ]
        shape = (sum(lengths), heads, size)
        values = rng.standard_normal(shape).astype(np.float32) if keys is None else keys[::-1]
        if keys is None:
            keys = rng.standard_normal(shape).astype(np.float32) + centre
        self.keys = mx.array(keys).astype(case.dtype)
        self.values = mx.array(np.ascontiguousarray(values)).astype(case.dtype)
        self.token = self.store(slice(None))
        mx.eval(self.token)

    def store(self, which: slice, pages: mx.array | None = None) -> mx.array:
        slots = np.concatenate(self.slots)[which].astype(np.int32)
        with mx.stream(DEVICE):
            token = self.launcher.store(
                self.pages if pages is None else pages,
                self.keys[which],
                self.values[which],
                mx.array(slots),
                self.constants,
            )
            mx.eval(token)
        return token

    def decode(self, queries: np.ndarray, **settings) -> np.ndarray:
        """queries [B, Q, Hq, D]; returns float32 [B, Q, Hq, D]."""
        with mx.stream(DEVICE):
            outputs = self.launcher.decode(
                self.pages,
                mx.array(queries).astype(self.case.dtype),
                mx.array(self.table.astype(np.int32)),
                mx.array(np.array(self.lengths, np.int32)),
                self.constants,
                self.case.head_size**-0.5,
                max(self.lengths),
                self.token,
                **settings,
            )
            return np.array(outputs.astype(mx.float32))

    def dequantize(self, request: int, first: int, count: int, **settings) -> list[np.ndarray]:
        table = mx.array(self.table[request].astype(np.int32))
        with mx.stream(DEVICE):
            made = self.launcher.dequantize(
                self.pages, table, self.constants, first, count, self.token, mx.float32, **settings
            )
            return [np.array(array) for array in made]

    def queries(self, num_queries: int = 1) -> np.ndarray:
        rng = np.random.default_rng(1)
        heads = self.case.num_kv_heads * self.case.group
        return rng.standard_normal(
            (len(self.lengths), num_queries, heads, self.case.head_size)
        ).astype(np.float16)

    def expected(self, queries: np.ndarray, **settings) -> np.ndarray:
        """The oracle over what the codec makes of the same keys and values."""
        ends = np.cumsum(self.lengths)
        outputs = []
        for i, (end, length) in enumerate(zip(ends, self.lengths, strict=True)):
            own = slice(int(end) - length, int(end))
            keys = self.key_codec.dequantize(self.key_codec.quantize(self.keys[own]))
            values = self.value_codec.dequantize(self.value_codec.quantize(self.values[own]))
            rounded = np.array(mx.array(queries[i]).astype(self.case.dtype).astype(mx.float32))
            outputs.append(
                reference.attention(
                    rounded.swapaxes(0, 1),
                    np.array(keys).swapaxes(0, 1),
                    np.array(values).swapaxes(0, 1),
                    self.case.head_size**-0.5,
                    **settings,
                ).swapaxes(0, 1)
            )
        return np.stack(outputs)

    def check(self, num_queries: int = 1, **settings) -> None:
        queries = self.queries(num_queries)
        got = self.decode(queries, **settings)
        if "sinks" in settings:
            settings["sinks"] = np.array(settings["sinks"])
        expected = self.expected(queries, **settings)
        assert np.isfinite(got).all()
        rounding = 4e-3 if self.case.dtype == mx.bfloat16 else 0
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE + rounding

    def planes(self, quantized: Quantized, offsets: tuple[int, int, int], bits: int) -> None:
        """Asserts that codes, scales and biases lie where the layout says."""
        page_bytes = np.array(self.pages).view(np.uint8)
        codes = np.array(pack(quantized.codes, bits)).view(np.uint8)
        parts = [(offsets[0], codes), (offsets[1], _bytes(quantized.scales))]
        if quantized.biases is not None:
            parts.append((offsets[2], _bytes(quantized.biases)))
        slots = np.concatenate(self.slots)
        blocks, places = slots // self.case.block_size, slots % self.case.block_size
        for offset, part in parts:
            size = part.shape[-1]
            columns = offset + places[:, None] * size + np.arange(size)
            heads = np.arange(self.case.num_kv_heads)[None, :, None]
            stored = page_bytes[blocks[:, None, None], heads, columns[:, None, :]]
            np.testing.assert_array_equal(stored, part)

    def check_bytes(self) -> None:
        layout = self.layout
        keys = layout.key_codes_offset, layout.key_scales_offset, layout.key_biases_offset
        values = layout.value_codes_offset, layout.value_scales_offset, 0
        self.planes(self.key_codec.quantize(self.keys), keys, layout.key_format.bits)
        self.planes(self.value_codec.quantize(self.values), values, layout.value_format.bits)


def _bytes(numbers: mx.array) -> np.ndarray:  # [T, H] float16 -> [T, H, 2]
    return np.array(numbers).view(np.uint8).reshape(*numbers.shape, 2)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_store_decode_and_dequantize(case):
    """Bytes are the codec's, attention the oracle's, for lengths around the edges of a block."""
    stored = Stored(case, inputs.lengths(case.block_size))
    stored.check_bytes()
    stored.check()
    keys, values = stored.dequantize(-1, 2, stored.lengths[-1] - 2)
    last = slice(-stored.lengths[-1] + 2, None)
    for codec, made, given in (
        (stored.key_codec, keys, stored.keys[last]),
        (stored.value_codec, values, stored.values[last]),
    ):
        expected = np.array(codec.dequantize(codec.quantize(given))).swapaxes(0, 1)
        np.testing.assert_allclose(
            np.array(made), expected, rtol=0, atol=2e-3 * np.abs(expected).max()
        )


@pytest.mark.parametrize(
    "settings", [{}, {"window": 24}, {"softcap": 3.0}, {"sinks": True}], ids=str
)
@pytest.mark.parametrize("num_queries", [1, 3, 8])
def test_windows_softcaps_sinks_and_several_queries(settings, num_queries):
    case = Case("q8_0", "q4_0", 64, 2, 8, 2)
    stored = Stored(case, [8, 9, 23, 24, 25, 130])
    if "sinks" in settings:
        heads = case.num_kv_heads * case.group
        settings = {"sinks": mx.array(np.linspace(-2, 4, heads).astype(np.float32))}
    stored.check(num_queries, **settings)


def test_all_settings_together():
    stored = Stored(Case("uint4", "q3_0", 64, 1, 16, 2), [40, 300])
    sinks = mx.array([0.5, -1.0])
    stored.check(4, window=37, softcap=5.0, sinks=sinks)


@pytest.mark.parametrize("num_cores", [1, 40])
def test_several_thousand_tokens_in_one_or_many_splits(num_cores):
    case = Case("q8_0", "q3_0", 64, 1, 16, 3, options={"num_cores": num_cores})
    Stored(case, [3000, 5, 129]).check()


@pytest.mark.parametrize("name", list(inputs.vectors(64)))
def test_ugly_keys_and_values(name):
    """Their bytes are the codec's too, and attention stays finite and right."""
    case = Case("q5_0", "q3_0", 64, 1, 16, 4, mx.float32)
    vectors = inputs.vectors(64)[name]
    stored = Stored(case, [len(vectors) - 5, 5], keys=vectors[:, None, :])
    stored.check_bytes()
    queries = stored.queries()
    got, expected = stored.decode(queries), stored.expected(queries)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= 2e-2 * max(np.abs(expected).max(), 1e-12)


def test_tokens_stored_together_or_singly_give_the_same_bytes():
    for case in (Case("q3_0", "q5_0", 64, 2), Case("q6_0", "q2_0", 80, 1)):
        stored = Stored(case, [17])
        pages = mx.zeros(stored.pages.shape, mx.uint16)
        mx.eval(pages)
        for i in range(17):
            mx.eval(stored.store(slice(i, i + 1), pages))
        np.testing.assert_array_equal(np.array(pages), np.array(stored.pages))


def test_store_touches_its_slots_alone_and_skips_negative_ones():
    stored = Stored(Case(), [5], fill=0xABCD)
    before = np.array(stored.pages)
    untouched = np.array(stored.pages)
    stored.slots[0] = np.full(5, -1)
    stored.values = stored.values + 1
    stored.store(slice(None))
    np.testing.assert_array_equal(np.array(stored.pages), untouched)
    layout = stored.layout
    block = stored.table[0, 0]
    page_bytes = before.view(np.uint8)
    others = np.delete(before, block, axis=0)
    assert (others == 0xABCD).all()
    tail = page_bytes[block, :, 5 * layout.key_codes_bytes : layout.value_codes_offset]
    assert (tail.reshape(-1).view(np.uint16) == 0xABCD).all()


def test_what_lies_beyond_a_request_does_not_leak_into_it():
    """Slots past the end hold NaN scales."""
    Stored(Case("q8_0", "q3_0", 64, 2, 16, 4), [3, 17, 30], fill=0xFFFF).check()
    Stored(Case("uint4", "q3_0", 64, 1, 16, 2), [3, 17, 30], fill=0xFFFF).check(2, window=5)


def test_a_request_without_tokens_gives_zeros():
    stored = Stored(Case(), [6, 4])
    stored.lengths[1] = 0
    got = stored.decode(stored.queries())
    assert (got[1] == 0).all() and np.abs(got[0]).max() > 0


def test_rotated_dequantisation_scores_like_the_model_s_own():
    stored = Stored(Case("q8_0", "q8_0", 64, 2), [20])
    keys, _ = stored.dequantize(0, 0, 20, rotated=True)
    expected = stored.key_codec.quantizer.dequantize(stored.key_codec.quantize(stored.keys))
    np.testing.assert_allclose(np.array(keys), np.array(expected).swapaxes(0, 1), atol=5e-3)


def test_more_queries_than_a_step_verifies_are_refused():
    stored = Stored(Case(), [12])
    with pytest.raises(ValueError, match="9 query tokens"):
        stored.decode(stored.queries(9))
    with pytest.raises(ValueError, match="odd"):
        stored.dequantize(0, 1, 2)
