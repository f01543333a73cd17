"""Calibration samples are the model's own queries and keys, after RoPE."""

import mlx.core as mx
import numpy as np
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.attention.backend import Chunk
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.key_samples import KeySamples, collect_key_samples

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


def test_queries_of_every_layer_that_shares_the_keys_are_taken():
    """gemma4_shared: two layers of their own keys, two that read those of the second."""
    binding = ModelBinding(tiny_model("gemma4_shared"))
    own, shared = collect_key_samples(binding, TOKENS, 7)
    for shape, (queries, keys), layers in zip(binding.layers, (own, shared), (1, 3), strict=True):
        assert queries.shape == (len(TOKENS), layers * 4, shape.head_size)
        assert keys.shape == (len(TOKENS), 1, shape.head_size)


def test_queries_go_with_the_kv_head_that_they_read():
    binding = ModelBinding(tiny_model("gemma4_shared", num_key_value_heads=2))
    queries = [collect_key_samples(binding, TOKENS, 0)[layer][0] for layer in (0, 1)]
    assert queries[1].shape[1] == 3 * queries[0].shape[1]
    samples = KeySamples([2])
    samples.stored(0, mx.zeros((1, 2, 4)), mx.zeros((1, 2, 4)))
    metadata = PrefillMetadata(mx.zeros((1, 0)), mx.zeros((0,)), 0, 1)
    for start in (0, 10):
        heads = mx.repeat(mx.arange(start, start + 4)[:, None, None], 4, axis=2).astype(mx.float32)
        samples.attended(0, Chunk(heads, mx.zeros((2, 1, 4)), None, metadata, 1.0), None)
    assert samples.sample(0)[0][0, :, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


def test_fetched_layers_keep_their_queries_to_themselves():
    binding = ModelBinding(tiny_model("gemma2"))
    samples = collect_key_samples(binding, TOKENS, 100)
    assert all(queries is None for queries, _ in samples)
    near = collect_key_samples(binding, TOKENS, 0)[0][1]
    assert samples[0][1].shape == near.shape == (len(TOKENS), 2, binding.layers[0].head_size)
    assert np.abs(samples[0][1] - near).max() > 1e-3
