"""Requests whose logits are not finite: found in every step, and named to the scheduler.

An argmax over NaN gives token 0, and vLLM's sampler fails for a whole batch where one row is NaN.
So every row is checked in the evaluation of its step, before a token is chosen. A request that has
such a row gets no token; `vllm_metal/scheduler.py` ends it with an error, and the others go on.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import torch
from vllm.v1.outputs import ModelRunnerOutput

from vllm_metal.options.scheduler_class import ends_requests
from vllm_metal.runner.sampler import to_torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Report = Callable[[ModelRunnerOutput, Sequence[str]], None]
"""Names requests to the scheduler, in the output of their step."""


def are_finite(logits: mx.array) -> mx.array:  # [R, vocabulary] -> [R] bool
    """Whether a token can be chosen from each row, lazily: no NaN, and a largest logit.

    A model may rule tokens out by -inf.
    """
    return mx.isfinite(mx.logsumexp(logits, axis=-1))


def rows_in_torch(
    parts: Iterable[tuple[Sequence[int], mx.array]],
    shape: tuple[int, int],
    evaluate: Callable[..., None],
) -> tuple[torch.Tensor, np.ndarray]:
    """Logits as float32 of this `shape`, rows and vocabulary, and which rows are finite: [R] bool.

    Rows without logits are zeros, and so are those that are not finite.

    Args:
        parts: numbers of rows and their logits [.., vocabulary].
        shape: of the result.
        evaluate: computes arrays and writes the pages.
    """
    logits, are_sound = torch.zeros(shape), np.ones(shape[0], bool)
    for numbers, part in parts:
        finite = are_finite(part)
        evaluate(part, finite)
        are_sound[list(numbers)] = np.array(finite)
        logits[list(numbers)] = to_torch(mx.where(finite[:, None], part, 0))
    return logits, are_sound


def reporter(
    vllm_config: "VllmConfig", discard: Callable[[Sequence[str]], None] | None = None
) -> Report:
    """The function that names requests to the scheduler of this configuration.

    It raises RuntimeError if that is the user's own: such a request would never end.

    Args:
        vllm_config: vLLM's configuration.
        discard: told the same requests, since what they have written must not be kept.
    """
    ends_them = ends_requests(vllm_config)

    def report(output: ModelRunnerOutput, req_ids: Sequence[str]) -> None:
        if req_ids and not ends_them:
            raise RuntimeError(
                f"the logits of {', '.join(req_ids)} are not finite, and the scheduler "
                f"{vllm_config.scheduler_config.scheduler_cls} (--scheduler-cls) cannot end a "
                "request with an error"
            )
        if req_ids:
            if discard is not None:
                discard(req_ids)
            output.num_nans_in_logits = dict.fromkeys(req_ids, 1)

    return report
