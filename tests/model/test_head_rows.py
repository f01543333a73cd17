"""The head multiplies the rows that are sampled, and no others."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.tiny_models import SERVED, tiny_model
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.errors import ChangedLibraryError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.model import head_rows
from vllm_metal.model.head_rows import HeadRows
from vllm_metal.model.model_binding import ModelBinding

BLOCK = 8


@pytest.mark.parametrize("model_type", SERVED)
def test_rows_are_cut_only_when_asked(model_type):
    model = tiny_model(model_type)
    rows = HeadRows(model, lambda: model(mx.zeros((1, 3), mx.int32)))
    assert rows.spares_head
    tokens = mx.array([[5, 3, 8, 1]])
    every_row = model(tokens)
    with rows.last_only():
        last_row = model(tokens)
    with rows.last_only(False):
        assert model(tokens).shape == every_row.shape
    assert model(tokens).shape == every_row.shape
    assert (every_row.shape[1], last_row.shape[1]) == (4, 1)
    assert mx.allclose(last_row[:, -1], every_row[:, -1], atol=1e-4).item()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere2"])
def test_rows_pass_through_the_head_in_pieces(model_type):
    """With soft-caps and scales of the model's own after it; the layers do not run again."""
    model = tiny_model(model_type)
    rows = HeadRows(model, lambda: model(mx.zeros((1, 3), mx.int32)))
    tokens = mx.array([[5, 3, 8, 1, 7]])
    every_row = model(tokens)
    hidden = rows.input_of_head(lambda: model(tokens))
    assert hidden.shape[:2] == (1, 5) and hidden.shape[2] != every_row.shape[2]

    def run():
        return model(mx.zeros_like(tokens))

    pieces = [rows.head(hidden[:, begin : begin + 2], run) for begin in (0, 2, 4)]
    assert mx.allclose(mx.concatenate(pieces, axis=1), every_row, atol=1e-4).item()
    assert mx.allclose(model(tokens), every_row, atol=1e-4).item()


def test_a_failed_forward_does_not_leave_the_rows_cut():
    model = tiny_model("llama")
    rows = HeadRows(model, lambda: model(mx.zeros((1, 3), mx.int32)))
    with pytest.raises(ValueError), rows.last_only():
        raise ValueError
    assert model(mx.array([[5, 3, 8, 1]])).shape[1] == 4


def test_the_head_is_spared_the_other_rows():
    """The largest matrix product of a prefill has one row, not all."""
    seen = []
    model = tiny_model("llama")
    binding = ModelBinding(model)
    head = type(model.lm_head)

    class Watched(head):
        def __call__(self, x):
            seen.append(x.shape)
            return super().__call__(x)

    model.lm_head.__class__ = Watched
    backends = [DensePages(shape, BLOCK, mx.float32) for shape in binding.layers]
    bound = binding.bind(KVCache(backends, 3))
    metadata = PrefillMetadata(mx.array([[1, 2]]), mx.arange(12) + BLOCK, 0, 12)
    bound.forward(mx.zeros((1, 12), mx.int32), [metadata])
    bound.forward(mx.zeros((1, 12), mx.int32), [metadata], all_rows=True)
    size = model.args.hidden_size
    assert seen == [(1, 1, size), (1, 12, size)]


def test_a_module_whose_class_is_fixed_is_named():
    class Fixed(nn.Module):
        @property
        def __class__(self):
            return Fixed

        @__class__.setter
        def __class__(self, _):
            raise TypeError("__class__ assignment only supported for mutable types")

        def __call__(self, x):
            return x

    with pytest.raises(ChangedLibraryError, match=r"mlx .*Fixed\.__class__"):
        head_rows._replace_call(Fixed(), lambda out: out)
