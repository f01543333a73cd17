"""Requests stored through the kernels, beside what codec and oracle make of them.

KERNEL_TARGET=cuda or metal runs the kernels there; the codec stays on the CPU, whose rounding
defines the bytes.
"""

import os
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from tests import reference
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.kernel_library import (
    CudaTarget,
    Kernel,
    MetalTarget,
    Run,
)
from vllm_metal.metal_kernel_backend.paged.splits import MatrixForm
from vllm_metal.metal_kernel_backend.turboquant.bitpack import pack, pack_levels
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import key_format, value_format
from vllm_metal.metal_kernel_backend.turboquant.launcher import Launcher, LayerConstants
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout
from vllm_metal.metal_kernel_backend.turboquant.quantizer import Quantized


class TensorCoresOnHost(HostTarget):
    """The CPU, with the matrix form as NVIDIA's tensor cores run it."""

    def build(self, kernel: Kernel, resident: tuple[int, int] | None = None) -> Run:
        (header, text), *others = kernel.constants  # what every file begins with
        constants = (header, f"#define TENSOR_CORES\n{text}"), *others
        return super().build(replace(kernel, constants=constants), resident)


TARGETS = {"host": HostTarget, "cuda": CudaTarget, "metal": MetalTarget}
TARGET = TARGETS[os.environ.get("KERNEL_TARGET", "host")]()
DEVICE = mx.cpu if TARGET.name == "host" else mx.gpu

mx.set_default_device(mx.cpu)

FORMS = {
    "scalar": {"matrix": None},
    "matrix": {"matrix": MatrixForm(1, 8, 6)},
    "matrix-16": {"matrix": MatrixForm(1, 16, 4)},
    "tensor-cores": {"matrix": MatrixForm(1, 16, 4), "tensor_cores": True},
    "tensor-cores-8": {"matrix": MatrixForm(1, 8, 2), "tensor_cores": True},
}
"""Options of a case for each form of decode: with 8x8 products of Metal's or 16x8x16 of NVIDIA's,
and 8 or 16 tokens at a time. On a GPU its own products are taken."""

TOLERANCE = 3e-3
"""Largest |kernel - oracle| / |oracle| of an output: keys and queries are halves in the kernel."""


@dataclass(frozen=True)
class Case:
    """One instantiation: formats, head sizes, KV heads, block size, query heads per KV head, and
    unused bytes at the end of a page."""

    k_quant: str = "q8_0"
    v_quant: str = "q3_0"
    head_size: int = 64
    num_kv_heads: int = 2
    block_size: int = 16
    heads_per_kv_head: int = 4
    dtype: mx.Dtype = mx.float16
    options: dict = field(default_factory=dict, hash=False)
    head_size_v: int = 0
    """0: as the keys'."""
    padding: int = 0
    value_dtype: mx.Dtype | None = None
    """Of values; None: as keys and queries."""

    def __str__(self) -> str:
        kind = "+".join(
            str(dtype).removeprefix("mlx.core.")
            for dtype in (self.dtype, self.value_dtype)
            if dtype
        )
        sizes = f"{self.head_size}+{self.head_size_v}" if self.head_size_v else self.head_size
        return (
            f"{self.k_quant}/{self.v_quant}-D{sizes}-H{self.num_kv_heads}"
            f"-block{self.block_size}-G{self.heads_per_kv_head}-{kind}"
        )

    def of_form(self, form: str) -> "Case":
        """The same, decoded in one of `FORMS`."""
        return replace(self, options=self.options | FORMS[form])

    def layout(self) -> PageLayout:
        formats = key_format(self.k_quant), value_format(self.v_quant)
        sizes = self.head_size, self.head_size_v or self.head_size
        unpadded = PageLayout(*formats, *sizes, self.num_kv_heads, self.block_size)
        if not self.padding:
            return unpadded
        return replace(unpadded, padded_page_bytes=unpadded.page_size_bytes + self.padding)


class Stored:
    """Requests whose keys and values have been stored through the kernel."""

    def __init__(self, case: Case, lengths: list[int], seed: int = 0, keys=None, fill: int = 0):
        rng = np.random.default_rng(seed)
        self.case, self.lengths = case, lengths
        heads, size = case.num_kv_heads, case.head_size
        self.layout = layout = case.layout()
        centre = rng.standard_normal((heads, size)).astype(np.float32)
        multiplier = np.exp(0.2 * rng.standard_normal((heads, size))).astype(np.float32)
        self.key_codec = KeyCodec(layout.key_format, centre, multiplier)
        self.value_codec = ValueCodec(layout.value_format, layout.value_head_size)
        self.constants = LayerConstants(
            self.key_codec.centre,
            self.key_codec.key_factors,
            self.key_codec.query_factors,
            self.value_codec.factors,
        )
        options = dict(case.options)
        emulated = options.pop("tensor_cores", False) and TARGET.name == "host"
        self.launcher = Launcher(layout, TensorCoresOnHost() if emulated else TARGET, **options)
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
        rows = sum(lengths), heads
        if keys is None:
            keys = rng.standard_normal((*rows, size)).astype(np.float32) + centre
            values = rng.standard_normal((*rows, layout.value_head_size)).astype(np.float32)
        else:
            values = keys[::-1]
        self.keys = mx.array(keys).astype(case.dtype)
        self.values = mx.array(np.ascontiguousarray(values)).astype(case.value_dtype or case.dtype)
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
            made = self.launcher.read(
                self.pages, table, self.constants, first, count, self.token, mx.float32, **settings
            )
            return [np.array(array) for array in made]

    def queries(self, num_queries: int = 1) -> np.ndarray:
        rng = np.random.default_rng(1)
        heads = self.case.num_kv_heads * self.case.heads_per_kv_head
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

    def planes(self, quantized: Quantized, offsets: tuple[int, int, int, int], bits: int) -> None:
        """Asserts that codes, scales, biases and levels lie where the layout says."""
        page_bytes = np.array(self.pages).view(np.uint8)
        page_bytes = page_bytes[
            :, : self.layout.num_kv_heads * self.layout.head_page_bytes
        ].reshape(len(page_bytes), self.layout.num_kv_heads, -1)
        codes = np.array(pack(quantized.codes, bits)).view(np.uint8)
        parts = [(offsets[0], codes), (offsets[1], _bytes(quantized.scales))]
        if quantized.biases is not None:
            parts.append((offsets[2], _bytes(quantized.biases)))
        if quantized.levels is not None:
            halfwords = np.array(pack_levels(quantized.levels))
            for i in range(halfwords.shape[-1]):
                offset = offsets[3] + i * 2 * self.case.block_size
                parts.append(
                    (offset, np.ascontiguousarray(halfwords[..., i : i + 1]).view(np.uint8))
                )
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
        keys += (layout.key_levels_offset,)
        values = layout.value_codes_offset, layout.value_scales_offset, 0, 0
        self.planes(self.key_codec.quantize(self.keys), keys, layout.key_format.bits)
        self.planes(self.value_codec.quantize(self.values), values, layout.value_format.bits)


def _bytes(scales: mx.array) -> np.ndarray:  # [T, H] float16 -> [T, H, 2]
    return np.array(scales).view(np.uint8).reshape(*scales.shape, 2)
