"""Log-probabilities of a prompt's tokens, chunk by chunk (`prompt_logprobs`)."""

from typing import TYPE_CHECKING

import mlx.core as mx
import torch
from vllm.v1.outputs import LogprobsTensors

from vllm_metal.model.model_binding import RowLogits
from vllm_metal.runner.nan_logits import are_finite
from vllm_metal.runner.sampler import TorchSampler, to_torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState


def score_chunk(
    sampler: TorchSampler,
    request: "CachedRequestState",
    num_scheduled: int,
    vocab_size: int,
    chunk: RowLogits,
) -> tuple[LogprobsTensors | None, bool]:
    """The scores of a whole prompt, at its last chunk; and whether all logits are finite.

    The chunk's last row, which scores nothing yet, must be finite, too, for its scores to count.

    Args:
        sampler: keeps the scores of earlier chunks.
        request: whose prompt it is.
        num_scheduled: tokens of the chunk.
        vocab_size: of the logits.
        chunk: gives logits of some of its rows.
    """
    finite: list[bool] = []

    def piece(begin: int, end: int) -> torch.Tensor:
        logits = chunk.of(begin, end)
        finite.append(bool(mx.all(are_finite(logits)).item()))
        return to_torch(logits)

    piece(num_scheduled - 1, num_scheduled)
    scores = sampler.score_prompt(request, num_scheduled, vocab_size, piece)
    return scores, all(finite)
