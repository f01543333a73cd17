"""Structs of 32-bit numbers, by name."""

import mlx.core as mx
import numpy as np
import pytest

from vllm_metal.metal_kernel_backend.paged.parameters import Parameters

PAIR = Parameters("Pair", (("int", "count"), ("float", "scale")))


def test_the_words_of_a_struct_lie_in_the_order_of_its_fields():
    words = PAIR.array(scale=0.5, count=-3)
    assert words.dtype == mx.int32
    assert np.array(words)[0] == -3
    assert np.array(words)[1:].view(np.float32) == 0.5
    assert np.array(PAIR.array(scale=2, count=7))[1:].view(np.float32) == 2


def test_the_declaration_has_the_fields_in_the_same_order():
    assert PAIR.declaration() == "struct Pair {\n  int count;\n  float scale;\n};\n"


@pytest.mark.parametrize("values", [{"count": 1}, {"count": 1, "scale": 1.0, "window": 2}])
def test_missing_and_superfluous_members_are_named(values):
    with pytest.raises(ValueError, match=r"Pair has \['count', 'scale'\]; given: \['count'"):
        PAIR.array(**values)


def test_more_members_than_the_constant_address_space_takes_are_refused():
    with pytest.raises(ValueError, match="Many has 8 members, over 7"):
        Parameters("Many", tuple(("int", f"member{i}") for i in range(8)))
