"""Keys and values of a model to codes and back, in plain MLX.

    keys      k' = R (s m (k - centre))      queries   q' = R (s q / m)      q'.k' = q.(k - centre)
    values    v' = R (s v)                   outputs   o  = s R o'

R is the rotation, s its signs; centre and m are calibrated constants of the layer and KV head. The
centre moves every logit of a query by the same amount, which softmax does not see. k' and v' are
stored as `quantizer` says, keys with levels as `grouped_quantizer` does.
"""

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.turboquant.formats import Format
from vllm_metal.metal_kernel_backend.turboquant.grouped_quantizer import GroupedQuantizer
from vllm_metal.metal_kernel_backend.turboquant.quantizer import SMALL, Quantized, Quantizer
from vllm_metal.metal_kernel_backend.turboquant.rotation import rotate, signs


class KeyCodec:
    """Keys of one layer: [..., H, D] in any float type."""

    def __init__(self, format: Format, centre: np.ndarray, multiplier: np.ndarray):
        """`centre` and `multiplier` are float32 [H, D], from `calibration`."""
        head_size = centre.shape[-1]
        self.format = format
        self.has_levels = format.has_levels(head_size)
        self.quantizer = (
            GroupedQuantizer(format, head_size)
            if self.has_levels
            else Quantizer([(format, False)], head_size)
        )
        self.centre = mx.array(centre)
        self.key_factors = mx.array(signs(head_size) * multiplier)
        """s m: what a centred key is multiplied by, [H, D]."""
        self.query_factors = mx.array(signs(head_size) / multiplier)
        """s / m: what a query is multiplied by, [H, D]."""
        self.rotated_centre = rotate(self.centre * self.key_factors)
        """What the centre becomes, [H, D]. Scores of q' with k' + rotated_centre are those of
        uncentred keys: what attention sinks, logits without a key, are compared with."""

    def rotate_keys(self, keys: mx.array) -> mx.array:
        """Keys [..., H, D] to k', float32."""
        return rotate((keys.astype(mx.float32) - self.centre) * self.key_factors)

    def rotate_queries(self, queries: mx.array) -> mx.array:
        """Queries [..., Hq, D] to q', float32. Query head i reads KV head i // (Hq / H)."""
        *lead, query_heads, head_size = queries.shape
        num_kv_heads = self.query_factors.shape[0]
        by_kv_head = queries.astype(mx.float32).reshape(*lead, num_kv_heads, -1, head_size)
        rotated = rotate(by_kv_head * self.query_factors[:, None, :])
        return rotated.reshape(*lead, query_heads, head_size)

    def quantize(self, keys: mx.array) -> Quantized:
        """Keys [..., H, D] to codes and scales."""
        return self.quantizer.quantize(self.rotate_keys(keys))

    def dequantize(self, quantized: Quantized) -> mx.array:
        """Stored keys as the model's own keys, [..., H, D]."""
        return rotate(self.quantizer.dequantize(quantized)) * self.query_factors + self.centre


class ValueCodec:
    """Values of any layer: [..., D] in any float type."""

    def __init__(self, format: Format, head_size: int):
        self.format = format
        self.quantizer = Quantizer([(format, True)], head_size)
        self.factors = mx.array(signs(head_size))
        """s, [D]."""

    def rotate_values(self, values: mx.array) -> mx.array:
        """Values [..., D] to v', float32."""
        return rotate(values.astype(mx.float32) * self.factors)

    def unrotate_outputs(self, outputs: mx.array) -> mx.array:
        """Weighted sums of v', [..., D], to sums of values. Linear, so once after merging."""
        return rotate(outputs) * self.factors

    def quantize(self, values: mx.array) -> Quantized:
        """Values [..., D] to codes and scales."""
        return self.quantizer.quantize(self.rotate_values(values))

    def dequantize(self, quantized: Quantized) -> mx.array:
        """Stored values as the model's own values, [..., D]."""
        return self.unrotate_outputs(self.quantizer.dequantize(quantized))


class TokenCodec:
    """Keys and values of tokens together: in one pass where they have one size, without levels,
    and are few."""

    def __init__(self, keys: KeyCodec, values: ValueCodec):
        self._keys, self._values = keys, values
        heads, size = keys.centre.shape
        self._alike = size == values.factors.size and not keys.has_levels
        if self._alike:
            self._quantizer = Quantizer([(keys.format, False), (values.format, True)], size)
            centres, factors = np.zeros((2, heads, 1, 2, 1, 1, size), np.float32)
            centres[:, 0, 0, 0, 0] = keys.centre
            factors[:, 0, :, 0, 0] = np.stack([keys.key_factors, [values.factors] * heads], axis=1)
            self._centres, self._factors = mx.array(centres), mx.array(factors)

    def quantize(self, keys: mx.array, values: mx.array) -> Quantized:
        """Keys [T, H, Dk] and values [T, H, Dv] to what slots hold, a key's part first.

        Codes [H, T, Dk + Dv], scales [H, T, 2], and what only keys have: biases [H, T, 1] or None,
        levels [H, T, Dk / 16] or None.
        """
        if self._alike and keys.size + values.size <= SMALL:
            return self._quantize_at_once(keys, values)
        stored_keys = self._keys.quantize(keys)
        stored_values = self._values.quantize(values)
        codes = mx.concatenate([stored_keys.codes, stored_values.codes], axis=-1)
        scales = mx.stack([stored_keys.scales, stored_values.scales], axis=-1)
        biases, levels = stored_keys.biases, stored_keys.levels
        if biases is not None:
            biases = biases[..., None].swapaxes(0, 1)
        if levels is not None:
            levels = levels.swapaxes(0, 1)
        return Quantized(codes.swapaxes(0, 1), scales.swapaxes(0, 1), biases, levels)

    def _quantize_at_once(self, keys: mx.array, values: mx.array) -> Quantized:
        x = mx.concatenate([keys, values], axis=-1).astype(mx.float32)
        x = x.reshape(*keys.shape[:2], 2, 1, 1, -1).swapaxes(0, 1)
        stored = self._quantizer.quantize_spread(rotate((x - self._centres) * self._factors))
        biases = None if stored.biases is None else stored.biases[:, :, 0, 0, 0]
        return Quantized(stored.codes.flatten(2), stored.scales.flatten(2), biases)
