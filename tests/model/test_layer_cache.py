"""The cache protocol of one layer: what is stored, and what a model gets back."""

import gc
import weakref

import mlx.core as mx
import pytest

from tests.pages import keys_and_values
from vllm_metal.attention.backend import LayerShape
from vllm_metal.attention.masks import causal_mask
from vllm_metal.attention.metadata import AttentionMetadata, DecodeMetadata, PrefillMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.model.layer_cache import (
    CachePositions,
    ForwardPass,
    InPages,
    LayerKVCache,
    Observer,
    paged_layer,
)

BLOCK = 4
CHUNK = PrefillMetadata(mx.array([[2, 1]]), mx.array([11, 4, 5]), context_len=3, query_len=3)
ROWS = DecodeMetadata(
    mx.array([[1, 2], [3, 0]]), mx.array([6, 2]), mx.array([9, 13]), mx.array([5, 1]), 6
)
ROW = DecodeMetadata(mx.array([[1, 2]]), mx.array([6]), mx.array([9]), 5, 6)


def layer_of(
    metadata: AttentionMetadata, shape: LayerShape, masks_rows: bool = False
) -> LayerKVCache:
    kv_cache = KVCache([DensePages(shape, BLOCK, mx.float32)], 4)
    return LayerKVCache(0, shape, ForwardPass(kv_cache, (metadata,), masks_rows, Observer()))


def shape(fetched: bool, head_size_v: int = 6) -> LayerShape:
    return LayerShape(2, 8, head_size_v, fetched)


def new(metadata: AttentionMetadata) -> tuple[mx.array, mx.array]:
    batch, length = (1, 3) if isinstance(metadata, PrefillMetadata) else (len(metadata.seq_lens), 1)
    return tuple(mx.random.normal((batch, 2, length, size)) for size in (8, 6))


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("metadata", [CHUNK, ROW, ROWS], ids=["chunk", "row", "rows"])
def test_an_update_is_stored_at_once(metadata, fetched):
    """Also where nobody attends: another layer may, or a later forward."""
    layer = layer_of(metadata, shape(fetched))
    keys, values = new(metadata)
    layer.update_and_fetch(keys, values)
    kv_cache = layer._forward.kv_cache
    pages = keys_and_values(kv_cache.backends[0], kv_cache.pages(0))
    for page, part in zip(pages, (keys, values), strict=True):
        for i, slot in enumerate(metadata.slot_mapping.tolist()):
            token = part[0, :, i] if metadata is CHUNK else part[i, :, 0]
            assert mx.array_equal(page[slot // BLOCK, :, slot % BLOCK], token)


@pytest.mark.parametrize("metadata", [CHUNK, ROW, ROWS], ids=["chunk", "row", "rows"])
def test_what_comes_back_has_the_shape_of_all_tokens(metadata):
    for fetched in (False, True):
        keys, values = layer_of(metadata, shape(fetched)).update_and_fetch(*new(metadata))
        batch = new(metadata)[0].shape[0]
        assert keys.shape == (batch, 2, 6, 8) and values.shape == (batch, 2, 6, 6)


def test_arrays_in_pages_name_their_layer():
    layer, other = (layer_of(CHUNK, shape(fetched=False)) for _ in range(2))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    _, others = other.update_and_fetch(*new(CHUNK))
    assert paged_layer(keys, values) is layer
    assert layer.keys_and_values() == (keys, values)
    assert paged_layer(keys, keys) is None
    assert paged_layer(keys, others) is None
    assert paged_layer(values, keys) is None


@pytest.mark.parametrize(
    "compute", [mx.array, lambda x: x + 0, lambda x: x[:, :1], mx.contiguous, lambda x: -x]
)
def test_whatever_is_computed_from_them_is_a_plain_array(compute):
    layer = layer_of(CHUNK, shape(fetched=False))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    assert not isinstance(compute(keys), InPages)
    assert paged_layer(compute(keys), values) is None


def test_they_do_not_keep_their_layer_alive():
    """A graph that holds them would otherwise hold the pages, and the next write copy those."""
    layer = layer_of(CHUNK, shape(fetched=False))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()
    assert paged_layer(keys, values) is None


def test_they_are_full_of_nan():
    """Whoever computes on them after all is found out."""
    keys, values = layer_of(ROWS, shape(fetched=False)).update_and_fetch(*new(ROWS))
    assert mx.isnan(keys).all() and mx.isnan(values).all()


def test_fetched_arrays_are_never_taken_for_pages():
    layer = layer_of(CHUNK, shape(fetched=True))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    assert paged_layer(keys, values) is None
    assert not mx.isnan(keys).any()


def test_a_layer_read_before_it_is_updated():
    with pytest.raises(RuntimeError, match="before it stores any"):
        layer_of(CHUNK, shape(fetched=True)).keys_and_values()


def test_a_cache_never_updated_has_positions():
    unused = CachePositions(CHUNK)
    assert unused.offset == 3
    assert unused.make_mask(3) == "causal"
    with pytest.raises(RuntimeError, match="asks for positions"):
        _ = CachePositions(None).offset


class Notes(Observer):
    def __init__(self):
        self.seen = []

    def stored(self, layer, keys, values):
        self.seen.append(("stored", layer, keys.shape, values.shape))

    def attended(self, layer, chunk, outputs):
        self.seen.append(("attended", layer, chunk.queries.shape, chunk.scale, outputs.shape))


def test_an_observer_is_told_what_passes_through():
    notes = Notes()
    kv_cache = KVCache([DensePages(shape(False), BLOCK, mx.float32)], 4)
    layer = LayerKVCache(0, shape(False), ForwardPass(kv_cache, (CHUNK,), False, notes))
    layer.update_and_fetch(*new(CHUNK))
    layer.attend(mx.random.normal((1, 4, 3, 8)), 0.5, "causal", None)
    assert notes.seen == [
        ("stored", 0, (3, 2, 8), (3, 2, 6)),
        ("attended", 0, (4, 3, 8), 0.5, (4, 3, 6)),
    ]


def test_one_array_given_twice_is_stored_once():
    """An index of keys: mlx-lm's `update_and_fetch(k, k)`."""
    layer = layer_of(CHUNK, shape(fetched=True, head_size_v=0))
    keys, _ = new(CHUNK)
    fetched, same = layer.update_and_fetch(keys, keys)
    assert same is fetched
    assert mx.array_equal(fetched[:, :, 3:], keys)


def test_a_layer_may_be_attended_more_than_once():
    layer = layer_of(CHUNK, shape(fetched=False))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    queries = mx.random.normal((1, 4, 3, 8))
    first = layer.attend(queries, 0.5, "causal", None)
    before = layer._forward.kv_cache.pages(0).array
    again = layer.attend(2 * queries, 0.25, "causal", None)
    assert first.shape == (1, 4, 3, 6)
    assert mx.allclose(first, again, atol=1e-5)
    assert layer._forward.kv_cache.pages(0).array is before


def test_models_may_assign_to_its_arrays():
    """They do to order evaluation: `cache.keys = mx.depends(cache.keys, ...)`."""
    layer = layer_of(CHUNK, shape(fetched=True))
    keys, values = layer.update_and_fetch(*new(CHUNK))
    layer.keys = mx.depends(layer.keys, values)
    layer.values = mx.zeros_like(layer.values)
    assert layer.keys is keys and layer.values is values


@pytest.mark.parametrize(
    ("metadata", "settings", "masks_rows", "expected"),
    [
        (CHUNK, {}, True, "causal"),
        (CHUNK, {"return_array": True}, False, None),
        (CHUNK, {"window_size": 6}, False, "causal"),
        (CHUNK, {"window_size": 5}, False, 5),
        (ROWS, {}, True, None),
        (ROWS, {"return_array": True}, True, None),
        (ROWS, {"window_size": 2}, False, 2),
        (ROW, {"window_size": 2}, False, 2),
    ],
    ids=str,
)
def test_masks(metadata, settings, masks_rows, expected):
    layer = layer_of(metadata, shape(fetched=False), masks_rows)
    mask = layer.make_mask(3 if metadata is CHUNK else 1, **settings)
    if isinstance(expected, str):
        assert mask == expected
    else:
        assert mask is causal_mask(metadata, expected)


@pytest.mark.parametrize("settings", [{}, {"return_array": True}, {"window_size": 6}], ids=str)
@pytest.mark.parametrize(("metadata", "masks_rows"), [(ROW, True), (ROW, False), (ROWS, False)])
def test_single_tokens_that_see_everything_need_no_mask(metadata, masks_rows, settings):
    layer = layer_of(metadata, shape(fetched=False), masks_rows)
    assert layer.make_mask(1, **settings) is None
