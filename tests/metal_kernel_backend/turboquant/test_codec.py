"""The codec: what is stored stands for the model's own keys and values."""

import mlx.core as mx
import numpy as np
import pytest

from tests import reference
from vllm_metal.metal_kernel_backend.turboquant import codec as module
from vllm_metal.metal_kernel_backend.turboquant.codec import KeyCodec, TokenCodec, ValueCodec
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS

NAMES = list(KEY_FORMATS)

COSINES = {"q8_0": 0.99999, "q6_0": 0.99983, "q5_0": 0.9993, "q4_0": 0.9971, "q3_0": 0.9830}


@pytest.mark.parametrize("name", COSINES)
def test_cosine_of_random_bfloat16_vectors(name):
    """Head size 128, where a key takes b + 3/8 bits a coordinate (q3_0: b + 1/8)."""
    x = mx.random.normal((2000, 1, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    codec = KeyCodec(KEY_FORMATS[name], np.zeros((1, 128)), np.ones((1, 128)))
    assert (
        codec.format.bits_per_element(128) == codec.format.bits + (1 if name == "q3_0" else 3) / 8
    )
    y = np.array(codec.dequantize(codec.quantize(x)))[:, 0].astype(np.float64)
    x = np.array(x.astype(mx.float32))[:, 0].astype(np.float64)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert cosine.mean() >= COSINES[name]


@pytest.mark.parametrize("name", list(VALUE_FORMATS))
def test_value_scales_are_unbiased(name):
    """<x, x'> = <x, x>, but for the rounding of the scale to float16."""
    x = np.random.default_rng(2).standard_normal((500, 64)).astype(np.float32)
    codec = ValueCodec(VALUE_FORMATS[name], 64)
    y = np.array(codec.dequantize(codec.quantize(mx.array(x))))
    ratio = (x * y).sum(-1) / (x * x).sum(-1)
    np.testing.assert_allclose(ratio, 1, atol=6e-4)
    assert abs(ratio.mean() - 1) < 1e-4


def random_constants(heads: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    centre = 5 * rng.standard_normal((heads, head_size))
    multiplier = np.exp(0.5 * rng.standard_normal((heads, head_size)))
    return centre.astype(np.float32), multiplier.astype(np.float32)


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_scores_are_those_of_centred_keys(head_size):
    """q'.k' = q.(k - centre), for every query head of a group; nothing is quantised."""
    centre, multiplier = random_constants(2, head_size)
    codec = KeyCodec(KEY_FORMATS["q8_0"], centre, multiplier)
    rng = np.random.default_rng(5)
    keys = centre + rng.standard_normal((7, 2, head_size)).astype(np.float32)
    queries = rng.standard_normal((4, 6, head_size)).astype(np.float32)
    rotated_keys = np.array(codec.rotate_keys(mx.array(keys)))
    rotated_queries = np.array(codec.rotate_queries(mx.array(queries)))
    for head in range(6):
        scores = rotated_queries[:, head] @ rotated_keys[:, head // 3].T
        expected = queries[:, head] @ (keys - centre)[:, head // 3].T
        np.testing.assert_allclose(scores, expected, atol=2e-4)
        uncentred = rotated_keys[:, head // 3] + np.array(codec.rotated_centre)[head // 3]
        scores = rotated_queries[:, head] @ uncentred.T
        np.testing.assert_allclose(scores, queries[:, head] @ keys[:, head // 3].T, atol=1e-3)


@pytest.mark.parametrize("k_quant", NAMES)
def test_attention_over_codes_is_attention_over_their_meaning(k_quant):
    """Rotated queries on rotated codes give what the oracle gives on dequantised vectors."""
    centre, multiplier = random_constants(2, 64)
    key_codec = KeyCodec(KEY_FORMATS[k_quant], centre, multiplier)
    value_codec = ValueCodec(VALUE_FORMATS["q4_0"], 64)
    rng = np.random.default_rng(6)
    keys = (centre + rng.standard_normal((19, 2, 64))).astype(np.float32)
    values = rng.standard_normal((19, 2, 64)).astype(np.float32)
    query = rng.standard_normal((1, 4, 64)).astype(np.float32)
    stored_keys = key_codec.quantize(mx.array(keys))
    stored_values = value_codec.quantize(mx.array(values))

    rotated = key_codec.rotate_queries(mx.array(query)).reshape(2, 2, 64)
    scores = 0.125 * rotated @ key_codec.quantizer.dequantize(stored_keys).transpose(1, 2, 0)
    weights = mx.softmax(scores, axis=-1)
    merged = weights @ value_codec.quantizer.dequantize(stored_values).swapaxes(0, 1)
    outputs = np.array(value_codec.unrotate_outputs(merged)).reshape(4, 1, 64)

    expected = reference.attention(
        query.swapaxes(0, 1),
        np.array(key_codec.dequantize(stored_keys)).swapaxes(0, 1),
        np.array(value_codec.dequantize(stored_values)).swapaxes(0, 1),
        0.125,
    )
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


def test_centring_and_multiplying_help_keys_that_need_them():
    """Keys with a large shared mean and uneven channels, as real ones have."""
    centre, multiplier = random_constants(1, 64)
    rng = np.random.default_rng(7)
    keys = (centre + rng.standard_normal((400, 1, 64)) / multiplier).astype(np.float32)
    queries = (rng.standard_normal((100, 64)) * multiplier[0]).astype(np.float32)

    def noise(c: np.ndarray, m: np.ndarray) -> float:
        codec = KeyCodec(KEY_FORMATS["q4_0"], c, m)
        error = np.array(codec.dequantize(codec.quantize(mx.array(keys)))) - keys
        logits = queries @ error[:, 0].T
        return float((logits - logits.mean(-1, keepdims=True)).std())

    plain = noise(np.zeros_like(centre), np.ones_like(centre))
    centred = noise(centre, np.ones_like(centre))
    both = noise(centre, multiplier)
    assert centred < 0.5 * plain and both < 0.9 * centred


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize(
    ("k_quant", "v_quant"), [("q8_0", "q3_0"), ("q3_0", "q4_0"), ("uint4", "q8_0")]
)
def test_tokens_are_keys_and_values_side_by_side(monkeypatch, k_quant, v_quant, sizes, at_once):
    """Whether both are quantised in one pass, which needs one size, or one after the other."""
    monkeypatch.setattr(module, "SMALL", 10**6 if at_once else 0)
    key_codec = KeyCodec(KEY_FORMATS[k_quant], *random_constants(2, sizes[0]))
    value_codec = ValueCodec(VALUE_FORMATS[v_quant], sizes[1])
    rng = np.random.default_rng(8)
    keys, values = (mx.array(rng.standard_normal((5, 2, size))) for size in sizes)
    tokens = TokenCodec(key_codec, value_codec).quantize(keys, values)
    stored_keys, stored_values = key_codec.quantize(keys), value_codec.quantize(values)
    for token in range(5):
        for head in range(2):
            stored = stored_keys.codes[token, head], stored_values.codes[token, head]
            assert (tokens.codes[head, token] == mx.concatenate(stored)).all()
            stored = stored_keys.scales[token, head], stored_values.scales[token, head]
            assert tokens.scales[head, token].tolist() == [scale.item() for scale in stored]
            if stored_keys.biases is not None:
                assert tokens.biases[head, token].item() == stored_keys.biases[token, head].item()
            if stored_keys.levels is not None:
                assert (tokens.levels[head, token] == stored_keys.levels[token, head]).all()
    assert (tokens.biases is None) == (stored_keys.biases is None)
    assert (tokens.levels is None) == (stored_keys.levels is None)
