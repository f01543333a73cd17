"""Tokens whose key or value has an element that is NaN or infinite.

The rule of every backend: the output of a query that sees such a token is NaN, and no other output
is touched. Not those of the queries before it or beyond its window, whose keys and values other
requests may share through the prefix cache; and not those of the next owner of its block.

Attention replaces the score of a token that is not seen, whatever it is, but it multiplies every
value with a weight, and 0 * NaN is NaN. So a broken token's key is NaN and its value is zero.
"""

import mlx.core as mx


def confined(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Keys [..., Dk] and values [..., Dv] with those of broken tokens replaced.

    Each KV head is judged by itself. A layer that caches one array has values with Dv = 0, which
    are not computed (see `_joined` in `attention.backend`); its model makes values of the keys, and
    a query of the same request that does not see the token becomes NaN, too.
    """
    finite = _are_finite(keys)
    if values.shape[-1]:
        finite = finite & _are_finite(values)
        values = mx.where(finite, values, mx.zeros((), values.dtype))
    return mx.where(finite, keys, mx.array(mx.nan, keys.dtype)), values


def _are_finite(vectors: mx.array) -> mx.array:  # [..., D] -> bool [..., 1]
    return mx.all(vectors - vectors == 0, axis=-1, keepdims=True)
