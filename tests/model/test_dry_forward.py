"""What the dry forward finds out of models that do one thing each with their cache."""

import pickle
from collections.abc import Callable

import mlx.core as mx
import pytest
from mlx_lm.models.base import create_attention_mask

from vllm_metal.attention.backend import LayerShape
from vllm_metal.model.dry_forward import (
    UnsupportedModelError,
    dry_logits,
    observe,
    summarise,
)
from vllm_metal.model.model_binding import scaled_dot_product_attention

Attend = Callable[[mx.array, mx.array, mx.array, mx.array], object]


def shapes(run, num_caches, model_type):
    return observe(run, [None] * num_caches, model_type).shapes


def model(attend: Attend, update=lambda cache, k, v: cache.update_and_fetch(k, v), **mask):
    """A model of one layer with 2 KV heads of sizes 8 and 4: `attend(q, k, v, mask)`."""

    def run(token_ids, layers):
        h = mx.zeros((*token_ids.shape, 16))
        length = token_ids.shape[1]
        made = create_attention_mask(h, layers[0], **mask)
        keys, values = update(layers[0], mx.zeros((1, 2, length, 8)), mx.zeros((1, 2, length, 4)))
        attend(mx.zeros((1, 4, length, 8)), keys, values, made)
        return mx.zeros((*token_ids.shape, 32))

    return run


def plain(queries, keys, values, mask):
    return scaled_dot_product_attention(queries, keys, values, None, 1.0, mask)


def manual(queries, keys, values, mask):
    return mx.softmax(queries[:, ::2] @ keys.swapaxes(-1, -2), axis=-1) @ values


def twice(queries, keys, values, mask):
    """Shared keys and values."""
    plain(queries, keys, values, mask)
    return plain(queries, keys, values, mask)


def cast(queries, keys, values, mask):
    return plain(queries, keys.astype(mx.float16), values, mask)


def other_mask(queries, keys, values, mask):
    return plain(queries, keys, values, mx.zeros((queries.shape[2], keys.shape[2])))


def no_mask(queries, keys, values, mask):
    return plain(queries, keys, values, None)


def also_manual_with_one_token(queries, keys, values, mask):
    return (manual if queries.shape[2] == 1 else plain)(queries, keys, values, mask)


def sparse(queries, keys, values, mask):
    """Attends to everything as long as there is little."""
    if keys.shape[2] > 4096:
        return other_mask(queries, keys, values, mask)
    return plain(queries, keys, values, mask)


def values_as_keys(queries, keys, values, mask):
    return plain(queries, keys, keys, mask)


@pytest.mark.parametrize("mask", [{}, {"return_array": True}], ids=str)
@pytest.mark.parametrize("attend", [plain, twice])
def test_attention_is_left_to_the_backend(attend, mask):
    assert shapes(model(attend, **mask), 1, "x") == [LayerShape(2, 8, 4)]


@pytest.mark.parametrize(
    "attend",
    [
        manual,
        cast,
        other_mask,
        no_mask,
        also_manual_with_one_token,
        sparse,
        values_as_keys,
        lambda *_: None,
    ],
)
def test_any_other_use_needs_the_real_keys_and_values(attend):
    assert shapes(model(attend), 1, "x") == [LayerShape(2, 8, 4, fetched=True)]


def test_a_window_is_a_mask_of_its_own_however_short_the_request():
    assert shapes(model(plain, window_size=4096), 1, "x")[0].fetched


def index(cache, keys, values):
    keys, _ = cache.update_and_fetch(keys, keys)
    return keys, values


def test_one_array_given_twice_counts_once_where_it_is_fetched():
    assert shapes(model(lambda *_: None, index), 1, "x") == [LayerShape(2, 8, 0, True)]


def test_keys_that_are_values_are_two_arrays_to_a_backend():
    def same(cache, keys, values):
        return cache.update_and_fetch(keys, keys)

    assert shapes(model(plain, same), 1, "x") == [LayerShape(2, 8, 8)]


def never(cache, keys, values):
    return keys, values


def sometimes(cache, keys, values):
    return cache.update_and_fetch(keys, values) if keys.shape[2] == 1 else (keys, values)


def again(cache, keys, values):
    return cache.update_and_fetch(*cache.update_and_fetch(keys, values))


def unequal_heads(cache, keys, values):
    return cache.update_and_fetch(keys, values[:, :1])


def broken(cache, keys, values):
    raise AttributeError("'LayerKVCache' object has no attribute 'left_padding'")


def test_a_cache_never_used_is_no_layer():
    assert shapes(model(lambda *_: None, never), 1, "x") == [None]


@pytest.mark.parametrize(
    ("attend", "changes"), [(plain, False), (manual, False), (sparse, True), (cast, False)]
)
def test_attention_that_gets_sparse_with_length_is_told_apart(attend, changes):
    assert observe(model(attend), [None] * 1, "x").changes_with_length == changes


def test_what_only_one_token_does_is_no_change_with_length():
    assert not observe(model(also_manual_with_one_token), [None] * 1, "x").changes_with_length


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (sometimes, "layer 0 uses its cache in some forwards only"),
        (again, "layer 0 updates its cache 2 times in one forward, not once"),
        (unequal_heads, "layer 0 caches keys [1, 2, 3, 8] and values [1, 1, 3, 4] together"),
        (broken, "its forward pass failed on a paged cache ('LayerKVCache' object has no attri"),
    ],
)
def test_what_breaks_the_protocol_is_refused_by_name(update, reason):
    with pytest.raises(UnsupportedModelError, match="Model type 'odd' cannot be served") as error:
        shapes(model(lambda *_: None, update), 1, "odd")
    assert error.value.reasons[0].startswith(reason)


def test_logits_of_a_dry_forward():
    assert dry_logits(model(plain), [None]).shape == (1, 3, 32)


def test_a_refusal_is_short():
    assert summarise(["a"] * 30)[-1] == "and 26 more like these"
    assert len(summarise(["a"] * 30)) == 5
    assert summarise(["a", "b"]) == ["a", "b"]


def test_a_refusal_survives_the_way_between_processes():
    error = UnsupportedModelError("mamba", ["layer 0 needs recurrent state"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
