"""Dense decode against the oracle, in every way that the launcher offers, on the CPU or on a GPU
(KERNEL_TARGET=cuda or metal). Compressed pages: `turboquant/test_launcher.py`."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from tests.metal_kernel_backend.turboquant.stored_requests import DEVICE, TARGET
from vllm_metal.metal_kernel_backend.dense.kernels import DenseLauncher
from vllm_metal.metal_kernel_backend.dense.layout import DenseLayout
from vllm_metal.metal_kernel_backend.paged.kernels import LayerConstants

BLOCK, HEADS = 16, 2
LENGTHS = (9, 70, 131)
ROUNDING = 1e-5 if DEVICE == mx.cpu else 1e-4
"""Largest |kernel - oracle| / |oracle| of a float32 output; the exp2 of a GPU is approximate."""


def some(values, *normal) -> list:
    """All of them, those that are not `normal` in the nightly run alone."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in normal else pytest.mark.nightly,
        )
        for value in values
    ]


class Stored:
    """Requests in pages that held NaN before."""

    def __init__(self, key_size: int, value_size: int, dtype=mx.float32, **options):
        rng = np.random.default_rng(0)
        page = BLOCK * HEADS * (key_size + value_size) * dtype.size
        self.layout = DenseLayout(dtype, key_size, value_size, HEADS, BLOCK, page)
        self.launcher = DenseLauncher(self.layout, TARGET, **options)
        per_request = -(-max(LENGTHS) // BLOCK)
        num_blocks = len(LENGTHS) * per_request
        self.table = rng.permutation(num_blocks).reshape(len(LENGTHS), -1).astype(np.int32)
        self.pages = mx.full(self.layout.pages_shape(num_blocks), mx.nan, dtype)
        mx.eval(self.pages)
        self.kv = []
        self.token = self.launcher.no_token()
        for row, length in zip(self.table, LENGTHS, strict=True):
            positions = np.arange(length)
            slots = row[positions // BLOCK] * BLOCK + positions % BLOCK
            new = [
                mx.array(rng.standard_normal((length, HEADS, size)), mx.float32).astype(dtype)
                for size in (key_size, value_size)
            ]
            self.kv.append([np.array(x.astype(mx.float32)).swapaxes(0, 1) for x in new])
            arguments = *new, mx.array(slots.astype(np.int32)), LayerConstants(), self.token
            with mx.stream(DEVICE):
                self.token = self.launcher.store(self.pages, *arguments)

    def check(self, num_queries: int, group: int, tolerance: float = ROUNDING, **settings) -> None:
        rng, size = np.random.default_rng(1), self.layout.key_head_size
        shape = len(LENGTHS), num_queries, HEADS * group, size
        queries = rng.standard_normal(shape).astype(np.float32)
        with mx.stream(DEVICE):
            got = self.launcher.decode(
                self.pages,
                mx.array(queries).astype(self.layout.dtype),
                mx.array(self.table),
                mx.array(np.array(LENGTHS, np.int32)),
                LayerConstants(),
                size**-0.5,
                max(LENGTHS),
                self.token,
                **settings,
            )
        got = np.array(got.astype(mx.float32))
        if "sinks" in settings:
            settings["sinks"] = np.array(settings["sinks"])
        for i, (keys, values) in enumerate(self.kv):
            wanted = reference.attention(
                queries[i].swapaxes(0, 1), keys, values, size**-0.5, **settings
            ).swapaxes(0, 1)
            assert np.linalg.norm(got[i] - wanted) < tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("num_queries", some(range(1, 9), 1, 3, 8))
def test_up_to_eight_query_tokens(num_queries):
    Stored(64, 64).check(num_queries, group=3)
    Stored(64, 64).check(num_queries, group=3, window=20)


@pytest.mark.parametrize("group", some([1, 2, 3, 4, 5, 6, 7, 8, 12, 17], 1, 5, 8))
def test_any_number_of_query_heads(group):
    Stored(32, 64, max_rows=4 if group == 8 else 0).check(1, group)


@pytest.mark.parametrize(
    ("key_size", "value_size"),
    some([(4, 8), (7, 3), (16, 16), (72, 40), (128, 256), (512, 96)], (7, 3), (72, 40), (512, 96)),
)
@pytest.mark.parametrize("run_tokens", [2, 4])
def test_head_sizes(key_size, value_size, run_tokens):
    Stored(key_size, value_size, run_tokens=run_tokens).check(1, 3)


@pytest.mark.parametrize("window", [0, 1, 17, 64, 1000])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_windows_sinks_and_soft_caps(window, sinks, softcap):
    settings = {"sinks": mx.array([0.5, -1.0, 2.0, 0.0])} if sinks else {}
    Stored(64, 64).check(2, 2, window=window, softcap=softcap, **settings)


@pytest.mark.parametrize("num_cores", [1, 40, 200])
def test_splits_are_merged(num_cores):
    Stored(64, 64, num_cores=num_cores).check(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 1e-2)], ids=str)
def test_types(dtype, tolerance):
    Stored(128, 128, dtype).check(1, 4, tolerance)


def test_nine_query_tokens_are_refused():
    with pytest.raises(ValueError, match="9 query tokens per request; 1 to 8"):
        Stored(16, 16).check(9, 1)


def test_an_odd_first_token_is_refused():
    stored = Stored(16, 16)
    table, token = mx.array(stored.table[0]), stored.token
    with pytest.raises(ValueError, match="first token 1 is odd"):
        stored.launcher.read(stored.pages, table, LayerConstants(), 1, 2, token, mx.float32)


@pytest.mark.parametrize(("first", "count"), [(0, 131), (2, 1), (64, 33)])
def test_a_run_of_tokens_of_some_heads(first, count):
    stored = Stored(20, 64)
    table, heads = mx.array(stored.table[2]), slice(1, 2)
    arguments = LayerConstants(), first, count, stored.token, mx.float32, heads
    with mx.stream(DEVICE):
        read = stored.launcher.read(stored.pages, table, *arguments)
    for got, whole in zip(read, stored.kv[2], strict=True):
        np.testing.assert_array_equal(np.array(got), whole[1:2, first : first + count])
