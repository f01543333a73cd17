"""The oracle of every numerical test: plain NumPy, from the definitions, no MLX.

Attention is computed in float64 from float32 inputs. The quantiser is in float32 with each
operation rounded on its own and sums in a stated order, since stored bytes are compared with it.
"""

from __future__ import annotations

import numpy as np

FLOAT16_MAX = np.float32(65504.0)


def attention(
    queries: np.ndarray,  # [Hq, L, Dk], the last L tokens of the sequence
    keys: np.ndarray,  # [H, S, Dk]
    values: np.ndarray,  # [H, S, Dv]
    scale: float,
    sinks: np.ndarray | None = None,  # [Hq] logits that take weight and give nothing
    window: int = 0,  # tokens a query sees, itself included; 0: all
    softcap: float = 0.0,  # scores become softcap * tanh(score / softcap); 0: unchanged
) -> np.ndarray:  # [Hq, L, Dv]
    """Causal attention of the last L tokens over a sequence of S tokens, float32."""
    num_heads, num_queries, _ = queries.shape
    num_kv_heads, seq_len, _ = keys.shape
    group = num_heads // num_kv_heads
    positions = np.arange(seq_len - num_queries, seq_len)[:, None]
    seen = np.arange(seq_len) <= positions
    if window:
        seen &= np.arange(seq_len) > positions - window
    outputs = np.empty((num_heads, num_queries, values.shape[-1]), np.float32)
    for head in range(num_heads):
        k = keys[head // group].astype(np.float64)
        scores = scale * (queries[head].astype(np.float64) @ k.T)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, float(sinks[head]))
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(float(sinks[head]) - top)
        outputs[head] = weights / total @ values[head // group].astype(np.float64)
    return outputs


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of +1 and -1, [size, size], unscaled; size is a power of two."""
    index = np.arange(size)
    parity = np.array([[bin(i & j).count("1") & 1 for j in index] for i in index])
    return 1.0 - 2.0 * parity


def rotation_matrix(head_size: int) -> np.ndarray:
    """(I - (2 / m) 1 1^T) (x) H / sqrt(2^k) for head_size = m * 2^k, float64."""
    power = head_size & -head_size
    m = head_size // power
    mixing = np.eye(m) - 2.0 / m if m > 1 else np.eye(1)
    return np.kron(mixing, hadamard(power) / np.sqrt(power))


def rotate(x: np.ndarray) -> np.ndarray:
    """The rotation in float32 in the order that `rotation` defines, [..., D]."""
    head_size = x.shape[-1]
    power = head_size & -head_size
    m = head_size // power
    y = x.astype(np.float32).reshape(*x.shape[:-1], m, power)
    distance = 1
    while distance < power:
        pairs = y.reshape(*y.shape[:-1], power // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(y.shape)
        distance *= 2
    y = y * np.float32(1 / np.sqrt(power))
    if m > 1:
        total = y[..., 0, :]
        for block in range(1, m):
            total = total + y[..., block, :]
        y = y - (total * np.float32(2 / m))[..., None, :]
    return y.reshape(x.shape)


def tree_sum(x: np.ndarray) -> np.ndarray:
    """Neighbours in pairs within the 2^k of a block, then block by block; [..., D] to [...]."""
    head_size = x.shape[-1]
    power = head_size & -head_size
    sums = x.reshape(*x.shape[:-1], head_size // power, power)
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    total = sums[..., 0, 0]
    for block in range(1, sums.shape[-2]):
        total = total + sums[..., block, 0]
    return total


def quantize(
    y: np.ndarray,  # [D] float32, rotated
    midpoints: np.ndarray,  # float32 [n - 1]
    centroids: np.ndarray,  # float32 [n]
    factors: np.ndarray,  # float32: candidate scales of a vector whose largest magnitude is 1
    unbiased: bool,
    has_bias: bool = False,
) -> tuple[np.ndarray, np.float16, np.float16]:
    """Codes uint8 [D], scale and bias of one vector, one candidate scale at a time."""
    y = np.clip(y.astype(np.float32), np.float32(-(2.0**24)), np.float32(2.0**24))
    bias = np.float16(0)
    if has_bias:
        middle = (y.max() + y.min()) * np.float32(0.5)
        bias = np.clip(middle, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
        y = y - np.float32(bias)
    half = len(centroids) // 2
    chosen, best = None, np.float32(-1)
    for factor in factors:
        scale = np.abs(y).max() * factor
        codes = _codes(y, scale, midpoints[half:], half)
        along = tree_sum(y * centroids[codes])
        energy = tree_sum(centroids[codes] * centroids[codes])
        if along * along / energy > best:
            best = along * along / energy
            chosen = (codes, along, energy)
    codes, along, energy = chosen
    if not unbiased:
        scale = along / energy
    else:
        scale = tree_sum(y * y) / along if along > 0 else np.float32(0)
    return codes.astype(np.uint8), np.minimum(scale, FLOAT16_MAX).astype(np.float16), bias


def quantize_with_levels(
    y: np.ndarray,  # [D] float32, rotated
    bits: int,
    factors: np.ndarray,  # float32: candidate scales of a vector whose largest magnitude is 1
) -> tuple[np.ndarray, np.ndarray, np.float16]:
    """Codes [D], levels [D / 16] and scale of one key: grids of 2^bits cells over (-4, 4) times
    (12 + level) / 32 times the scale."""
    y = np.clip(y.astype(np.float32), np.float32(-(2.0**24)), np.float32(2.0**24))
    half, cell = 1 << (bits - 1), np.float32(8 / (1 << bits))
    groups = np.abs(y).reshape(-1, 16)
    chosen, best = None, np.float32(-1)
    for factor in factors:
        scale = np.abs(y).max() * factor
        levels, steps = [], []
        for group in groups:
            reaching = group.max() < np.arange(12, 28) * (scale * np.float32(0.125))
            lowest = min(int(np.argmax(reaching)) if reaching.any() else 15, 13)
            tried, gains = [], []
            for level in range(lowest, lowest + 3):
                weight = np.float32((12 + level) / 32) * cell
                bounds = np.arange(1, half, dtype=np.float32) * (scale * weight)
                tried.append((group[:, None] >= bounds).sum(axis=1))
                centroids = (tried[-1] + np.float32(0.5)) * weight
                centroids = centroids.astype(np.float32)
                along, energy = tree_sum(group * centroids), tree_sum(centroids * centroids)
                gains.append(2 * along - scale * energy)
            which = int(np.argmax(gains))
            levels.append(lowest + which)
            steps.append(tried[which])
        weights = np.float32(12 + np.array(levels)[:, None]) / np.float32(32) * cell
        centroids = ((np.array(steps) + np.float32(0.5)) * weights).astype(np.float32).reshape(-1)
        along = tree_sum(np.abs(y) * centroids)
        energy = tree_sum(centroids * centroids)
        if along * along / energy > best:
            best = along * along / energy
            chosen = np.concatenate(steps), np.array(levels), along / energy
    steps, levels, scale = chosen
    codes = np.where(y >= 0, half + steps, half - 1 - steps)
    return codes.astype(np.uint8), levels, np.minimum(scale, FLOAT16_MAX).astype(np.float16)


def _codes(y: np.ndarray, scale: np.float32, positive: np.ndarray, half: int) -> np.ndarray:
    """A code counts the positive midpoints that its coordinate's magnitude reaches."""
    steps = (np.abs(y)[:, None] >= positive * scale).sum(axis=1)
    return np.where(y >= 0, half + steps, half - 1 - steps)


def relative_error(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y| / |x| of each vector, in float64; 0 where both are zero."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1)
    return np.linalg.norm(x - y, axis=-1) / np.where(norm > 0, norm, 1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [D] to halfwords uint16 [D * bits / 16], bit by bit, from the table in `bitpack`."""
    fields, spare = divmod(16, bits)
    halfwords = []
    for group in codes.astype(np.int64).reshape(-1, 16).tolist():
        words = [0] * bits
        for i, code in enumerate(group[: bits * fields]):
            words[i // fields] |= code << (i % fields * bits)
        rest = group[bits * fields :]
        stream = [code >> bit & 1 for code in rest for bit in range(bits)]
        for i, bit in enumerate(stream):
            words[i // spare] |= bit << (16 - spare + i % spare)
        halfwords += words
    return np.array(halfwords, np.uint16)
