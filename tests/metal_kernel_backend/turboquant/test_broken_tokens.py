"""Keys, values and queries that are not finite, in the kernels: what is stored, and who sees it.

The rule is that of `attention.broken_tokens`; every backend is held to it in `tests/attention`.
"""

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_kernel_backend.turboquant.stored_requests import FORMS, Case, Stored


def nightly_unless(form: str, *normal: str) -> list:
    return [] if form in normal else [pytest.mark.nightly]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pair", [("q4_0", "q3_0", 128), ("uint4", "q2_0", 80), ("int8", "q8_0")])
def test_the_bytes_of_vectors_that_are_not_finite_are_the_codecs(pair, poison):
    """With levels, with a bias and a head size of 5 blocks, and uniform."""
    stored = Stored(Case(*pair), [5])
    for name in ("keys", "values"):
        vectors = np.array(getattr(stored, name))
        vectors[1, 0, 3] = vectors[4] = poison
        setattr(stored, name, mx.array(vectors))
    stored.store(slice(None))
    stored.check_bytes()


@pytest.mark.parametrize("field", [pytest.param("keys", marks=pytest.mark.nightly), "values"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"window": 40}, marks=pytest.mark.nightly),
        pytest.param({"sinks": True}, marks=pytest.mark.nightly),
        pytest.param({"softcap": 3.0}, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=nightly_unless(f, "scalar", "matrix")) for f in FORMS]
)
def test_a_broken_token_in_one_of_many_splits_reaches_the_output(field, settings, form):
    """Of those rows that see it. Rows and requests beside them stay what they were.

    With 3 heads, a lane of the matrix form has rows of two query tokens."""
    heads = 4 if form == "scalar" else 3
    case = Case("q8_0", "q3_0", 64, 2, 16, heads, mx.float32, {"num_cores": 16})
    stored = Stored(case.of_form(form), [600, 500])
    if "sinks" in settings:
        settings = {"sinks": mx.array(np.linspace(-1, 2, 2 * heads).astype(np.float32))}
    queries = stored.queries(3)
    sound = stored.decode(queries, **settings)
    for position in (20, 560, 598):
        vectors = np.array(getattr(stored, field))
        kept = vectors.copy()
        vectors[position, 1, 5] = np.nan
        setattr(stored, field, mx.array(vectors))
        stored.token = stored.store(slice(None))
        broken = stored.decode(queries, **settings)
        rows = np.arange(597, 600)  # positions of the queries
        sees = (rows >= position) & (rows - position < settings.get("window", 600))
        affected = np.zeros(broken.shape, bool)
        affected[0, sees, heads:] = True
        assert np.isnan(broken[affected]).all(), position
        np.testing.assert_array_equal(broken[~affected], sound[~affected])
        setattr(stored, field, mx.array(kept))


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=nightly_unless(f, "scalar", "tensor-cores")) for f in FORMS]
)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_a_row_of_nan_alone(poison, form):
    stored = Stored(Case().of_form(form), [40, 30])
    queries = stored.queries(2)
    sound = stored.decode(queries)
    queries[0, 1, 2, 9] = poison
    broken = stored.decode(queries)
    affected = np.zeros(broken.shape, bool)
    affected[0, 1, 2] = True
    assert np.isnan(broken[affected]).all()
    np.testing.assert_array_equal(broken[~affected], sound[~affected])


@pytest.mark.parametrize("field", ["keys", "values"])
def test_a_broken_token_is_dequantised_as_a_key_of_nan_and_a_value_of_zeros(field):
    stored = Stored(Case("uint4", "q5_0", 64, 2, 16, 1), [21])
    sound = stored.dequantize(0, 0, 21)
    vectors = np.array(getattr(stored, field))
    vectors[6, 1, 5] = vectors[9, 0, 0] = np.nan
    setattr(stored, field, mx.array(vectors))
    stored.token = stored.store(slice(None))
    keys, values = stored.dequantize(0, 0, 21)
    broken = np.zeros((2, 21), bool)
    broken[1, 6] = broken[0, 9] = True
    assert np.isnan(keys[broken]).all() and not values[broken].any()
    for made, expected in zip((keys, values), sound, strict=True):
        np.testing.assert_array_equal(made[~broken], expected[~broken])
