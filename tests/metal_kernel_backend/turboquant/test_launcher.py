"""The kernels against the codec (bytes) and the oracle (attention): on the CPU, or on a GPU."""

import mlx.core as mx
import numpy as np
import pytest

from tests import inputs
from tests.metal_kernel_backend.turboquant.kernel_cases import kernel_cases
from tests.metal_kernel_backend.turboquant.stored_requests import FORMS, Case, Stored
from vllm_metal.metal_kernel_backend.paged.launches import Launches
from vllm_metal.metal_kernel_backend.turboquant.formats import value_format
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs


@pytest.mark.parametrize("case", kernel_cases())
def test_store_decode_and_dequantize(case):
    """Bytes are the codec's, attention the oracle's, for lengths around the edges of a block."""
    stored = Stored(case, inputs.lengths(case.block_size))
    stored.check_bytes()
    stored.check()
    sinks = mx.array(
        np.linspace(-1, 2, case.num_kv_heads * case.heads_per_kv_head).astype(np.float32)
    )
    softcap = {"softcap": 4.0} if case.heads_per_kv_head == 2 else {}  # as in Gemma 2
    stored.check(window=case.block_size + 3, sinks=sinks, **softcap)
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
@pytest.mark.parametrize(
    ("form", "num_queries"),
    [
        pytest.param(
            form,
            num_queries,
            marks=[] if form == "scalar" or num_queries == queries else pytest.mark.nightly,
        )
        for form, queries in zip(FORMS, (0, 3, 1, 8, 3), strict=True)
        for num_queries in (1, 3, 8)
    ],
)
def test_windows_softcaps_sinks_and_several_queries(settings, num_queries, form):
    case = Case("q8_0", "q4_0", 64, 2, 8, 2, options={"num_cores": 4 * num_queries})
    stored = Stored(case.of_form(form), [8, 9, 23, 24, 25, 130])
    if "sinks" in settings:
        heads = case.num_kv_heads * case.heads_per_kv_head
        settings = {"sinks": mx.array(np.linspace(-2, 4, heads).astype(np.float32))}
    stored.check(num_queries, **settings)


@pytest.mark.parametrize("form", ["scalar", "matrix", "tensor-cores"])
def test_all_settings_together(form):
    stored = Stored(Case("uint4", "q3_0", 64, 1, 16, 2).of_form(form), [40, 300])
    sinks = mx.array([0.5, -1.0])
    stored.check(4, window=37, softcap=5.0, sinks=sinks)


@pytest.mark.parametrize("form", FORMS)
def test_weights_far_apart(form):
    """A score of any size, in any order, beside value scales of any size: what the weights are
    relative to moves up and up, and a token that counts least at first counts alone at last."""
    case = Case("q8_0", "q8_0", 64, 1, 16, 2, mx.float32, {"num_cores": 1})
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((150, 1, 64)).astype(np.float32)
    keys *= np.linspace(0, 40, 150, dtype=np.float32)[:, None, None]
    stored = Stored(case.of_form(form), [150], keys=keys)
    sizes = 10.0 ** rng.uniform(-6, 4, (150, 1, 1))
    stored.values = mx.array((np.array(stored.values) * sizes).astype(np.float32))
    stored.values[40:56] = 0
    stored.token = stored.store(slice(None))
    queries = stored.queries()
    got, expected = stored.decode(queries), stored.expected(queries)
    errors = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() < 0.1  # of each row: its queries are halves, beside scores of a hundred


@pytest.mark.parametrize("form", ["scalar", "matrix"])
@pytest.mark.parametrize("settings", [{}, {"sinks": True}], ids=str)
def test_one_split_is_not_merged(form, settings, monkeypatch):
    """Its output is what many splits give, and a request without tokens gives zeros."""
    if settings:
        settings = {"sinks": mx.array(np.linspace(-2, 4, 8).astype(np.float32))}
    outputs, launched, launch = [], [], Launches.launch

    def noting(self, kernel, *arguments):
        launched.append(kernel.name)
        return launch(self, kernel, *arguments)

    monkeypatch.setattr(Launches, "launch", noting)
    for num_cores, merges in ((1, 0), (64, 1)):
        case = Case("q8_0", "q3_0", 64, 2, 16, 4, mx.float32, {"num_cores": num_cores})
        stored = Stored(case.of_form(form), [900, 33, 17])
        stored.lengths[2] = 0
        outputs.append(stored.decode(stored.queries(), **settings))
        assert launched.count("turboquant_merge") == merges
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-3, atol=2e-4)
    assert not outputs[0][2].any() and outputs[0][:2].all()


@pytest.mark.parametrize("num_cores", [1, 40])
def test_several_thousand_tokens_in_one_or_many_splits(num_cores):
    case = Case("q8_0", "q3_0", 64, 1, 16, 3, options={"num_cores": num_cores})
    Stored(case, [3000, 5, 129]).check()


@pytest.mark.parametrize(
    ("k_quant", "v_quant", "head_size"),
    [("q5_0", "q3_0", 64), ("q8_0", "q8_0", 64), ("uint4", "q2_0", 80), ("q4_0", "q8_0", 128)],
)
@pytest.mark.parametrize("name", list(inputs.vectors(64)))
def test_ugly_keys_and_values(name, k_quant, v_quant, head_size):
    """Their bytes are the codec's too, and attention stays finite and right."""
    case = Case(k_quant, v_quant, head_size, 1, 16, 4, mx.float32)
    vectors = inputs.vectors(head_size)[name]
    stored = Stored(case, [len(vectors) - 5, 5], keys=vectors[:, None, :])
    stored.check_bytes()
    queries = stored.queries()
    got, expected = stored.decode(queries), stored.expected(queries)
    assert np.isfinite(got).all()
    scores = np.linalg.norm(queries, axis=-1).max() * np.linalg.norm(vectors, axis=-1).max()
    rounding = scores * head_size**-0.5 * 2**-12  # of scores: queries are halves in the kernel
    bound = (2e-2 + rounding) * np.abs(expected).max()
    assert np.abs(got - expected).max() <= max(bound, 1e-14)


def on_a_bound() -> np.ndarray:
    """Whole numbers [N, 64], each row with one that lies on a bound of q8_0 cells, or next to it.

    Exact after rotation and back, if rotated first: sums of whole numbers over 8.
    """
    rng = np.random.default_rng(0)
    largest = np.arange(1000, 4000, dtype=np.float32)
    rows = []
    for factor in value_format("q8_0").scale_factors(64):
        widths = largest * factor * np.float32(1 / 32)
        bounds = widths[:, None] * np.arange(1, 128, dtype=np.float32)
        whole = np.rint(bounds)
        near = (np.abs(bounds - whole) <= np.spacing(bounds)) & (whole < largest[:, None])
        for i, j in np.argwhere(near)[:100]:
            row = np.rint(rng.standard_normal(64) * largest[i] / 3)
            row = np.clip(row, -largest[i], largest[i])
            row[:2] = largest[i], whole[i, j]
            rows.append(row)
    return np.array(rows, np.float32)


def test_magnitudes_on_a_bound_and_next_to_it():
    """The kernel's first guess of a code may be off by one there; the stored one may not."""
    rotated = on_a_bound()
    values = np.array(rotate(mx.array(rotated))) * signs(64)
    assert (np.array(rotate(mx.array(values * signs(64)))) == rotated).all()
    case = Case("q8_0", "q8_0", 64, 1, 16, 1, mx.float32)
    keys = np.ascontiguousarray(values[::-1, None, :])  # whose reverse are the values
    Stored(case, [len(values)], keys=keys).check_bytes()


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
    page_bytes = before.view(np.uint8).reshape(len(before), layout.num_kv_heads, -1)
    others = np.delete(before, block, axis=0)
    assert (others == 0xABCD).all()
    tail = page_bytes[block, :, 5 * layout.key_codes_bytes : layout.value_codes_offset]
    assert (tail.reshape(-1).view(np.uint16) == 0xABCD).all()


@pytest.mark.parametrize("form", ["scalar", "matrix", "tensor-cores"])
def test_what_lies_beyond_a_request_does_not_leak_into_it(form):
    """Slots past the end hold NaN scales."""
    for case, arguments in (
        (Case("q8_0", "q3_0", 64, 2, 16, 4), {}),
        (Case("uint4", "q3_0", 64, 1, 16, 2), {"num_queries": 2, "window": 5}),
    ):
        Stored(case.of_form(form), [3, 17, 30], fill=0xFFFF).check(**arguments)


def test_a_request_without_tokens_gives_zeros():
    stored = Stored(Case(), [6, 4])
    stored.lengths[1] = 0
    got = stored.decode(stored.queries())
    assert (got[1] == 0).all() and np.abs(got[0]).max() > 0


def test_some_heads_are_dequantised_as_with_all_of_them():
    stored = Stored(Case("q6_0", "q5_0", 64, 3), [20])
    for part, whole in zip(
        stored.dequantize(0, 6, 13, heads=slice(1, 3)), stored.dequantize(0, 6, 13), strict=True
    ):
        assert part.shape == (2, 13, 64)
        np.testing.assert_array_equal(part, whole[1:])


def test_more_queries_than_a_step_verifies_are_refused():
    stored = Stored(Case(), [12])
    with pytest.raises(ValueError, match="9 query tokens"):
        stored.decode(stored.queries(9))
    with pytest.raises(ValueError, match="odd"):
        stored.dequantize(0, 1, 2)
