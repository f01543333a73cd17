"""The inputs that numerical tests begin with: ordinary ones, and the ugly."""

from __future__ import annotations

import numpy as np


def lengths(block_size: int) -> list[int]:
    """Sequence lengths around the edges of a block."""
    return [1, block_size - 1, block_size, block_size + 1, 3 * block_size + 5]


def vectors(head_size: int, count: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """Named cases, each float32 [count, head_size]."""
    rng = np.random.default_rng([head_size, seed])
    gaussian = rng.standard_normal((count, head_size)).astype(np.float32)
    outlier = gaussian.copy()
    outlier[:, head_size // 3] *= 1000
    single = np.zeros_like(gaussian)
    single[np.arange(count), np.arange(count) % head_size] = 3
    largest = np.float32(65504)
    return {
        "gaussian": gaussian,
        "zeros": np.zeros_like(gaussian),
        "constant": np.full_like(gaussian, 0.5),
        "negative constant": np.full_like(gaussian, -0.3),
        "constant with noise": 0.5 + 1e-3 * gaussian,
        "one channel 1000 times the rest": outlier,
        "one channel alone": single,
        "huge norm": gaussian * 1e4,
        "tiny norm": gaussian * 1e-4,
        "shared mean": gaussian + 20 * gaussian[:1],
        "largest float16": np.where(gaussian > 0, largest, -largest),
        "alternating signs": np.resize(np.float32([1, -1]), gaussian.shape),
    }


def beyond(head_size: int, count: int = 8) -> dict[str, np.ndarray]:
    """Cases no float16 scale can hold: results need only be finite. float32 [count, head_size]."""
    gaussian = np.random.default_rng(head_size).standard_normal((count, head_size))
    return {
        "largest float32": np.full((count, head_size), 3e38, np.float32),
        "largest float32, both signs": (np.sign(gaussian) * 3e38).astype(np.float32),
        "vanishing": (gaussian * 1e-30).astype(np.float32),
        "subnormal": (gaussian * 1e-42).astype(np.float32),
        "below a float16": (gaussian * 1e-7).astype(np.float32),
    }
