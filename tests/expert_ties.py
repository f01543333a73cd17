"""How close a mixture of experts is to choosing another expert."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest


def expert_leads(model: nn.Module, token_ids: Sequence[int]) -> list[float]:
    """By how much the last expert that is chosen is ahead of the best that is not.

    Args:
        model: one of mlx-lm, which chooses with `mx.argpartition` of the router's scores.
        token_ids: of one sequence.

    Returns:
        Of each token the smallest lead in any layer, in the scores that the router compares;
        infinity where the model has no experts.
    """
    leads = [mx.full(len(token_ids), float("inf"))]
    argpartition = mx.argpartition

    def observed(scores: mx.array, kth: int, axis: int = -1) -> mx.array:
        ordered = mx.sort(scores, axis=axis)
        best, next_best = (kth, kth - 1) if kth < 0 else (kth + 1, kth)
        leads.append((ordered[..., best] - ordered[..., next_best]).reshape(-1))
        return argpartition(scores, kth=kth, axis=axis)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "argpartition", observed)
        mx.eval(model(mx.array([token_ids])))
    return mx.min(mx.stack(leads), axis=0).tolist()
