"""The error of attention outputs: none for exact pages, what is planted otherwise."""

import mlx.core as mx
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.evaluation.attention_error import attention_error
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.model.model_binding import ModelBinding


class Louder(DensePages):
    """Gives every output a tenth too large."""

    def prefill(self, pages, chunk):
        return super().prefill(pages, chunk) * 1.1


@pytest.mark.parametrize(("kind", "expected"), [(DensePages, 0.0), (Louder, 0.1)])
def test_relative_error(kind, expected):
    binding = ModelBinding(tiny_model("llama"))
    backends = [kind(shape, 16, mx.float32) for shape in binding.layers]
    assert attention_error(binding, backends, list(range(40))) == pytest.approx(expected, abs=1e-4)


def test_the_root_mean_square_over_layers():
    binding = ModelBinding(tiny_model("llama"))
    kinds = [Louder, *(len(binding.layers) - 1) * [DensePages]]
    backends = [
        kind(shape, 16, mx.float32) for kind, shape in zip(kinds, binding.layers, strict=True)
    ]
    error = attention_error(binding, backends, list(range(40)))
    assert error == pytest.approx(0.1 / len(kinds) ** 0.5, rel=1e-3)
