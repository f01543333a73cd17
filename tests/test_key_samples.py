"""Calibration samples are the model's own queries and keys, after RoPE."""

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.key_samples import collect_key_samples

TOKENS = [5, 3, 8, 1, 9]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_shapes_and_first_layer(model):
    binding = ModelBinding(model)
    samples = collect_key_samples(binding, TOKENS, 0)
    assert len(samples) == len(binding.layers)
    queries, keys = samples[0]
    shape = binding.layers[0]
    assert keys.shape == (len(TOKENS), shape.num_kv_heads, shape.head_size)
    assert queries.shape[0] == len(TOKENS) and queries.shape[2] == shape.head_size
    attention = model.layers[0].self_attn
    x = model.layers[0].input_layernorm(model.model.embed_tokens(mx.array([TOKENS])))
    projected = attention.k_proj(x).reshape(1, len(TOKENS), shape.num_kv_heads, -1)
    expected = attention.rope(projected.transpose(0, 2, 1, 3))[0].swapaxes(0, 1)
    np.testing.assert_allclose(keys, np.array(expected), atol=1e-5)


def test_an_offset_turns_the_keys(model):
    binding = ModelBinding(model)
    near = collect_key_samples(binding, TOKENS, 0)[0][1]
    far = collect_key_samples(binding, TOKENS, 100)[0][1]
    assert np.abs(near - far).max() > 1e-3
    np.testing.assert_allclose(
        np.linalg.norm(near, axis=-1), np.linalg.norm(far, axis=-1), rtol=1e-4
    )
