"""The scores of a prompt count where all logits of its chunks are finite."""

import math
from types import SimpleNamespace

import mlx.core as mx
import pytest
import torch

from vllm_metal.runner.prompt_scores import score_chunk

VOCABULARY = 7


class Sampler:
    """Asks for the logits of all rows but the last, and gives them back."""

    def score_prompt(self, request, num_scheduled, vocab_size, piece):
        assert vocab_size == VOCABULARY
        return torch.cat([piece(row, row + 1) for row in range(num_scheduled - 1)])


@pytest.mark.parametrize("broken", [None, 0, 3, 4], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_row_is_told(broken, value):
    """Also the last one, which scores nothing yet."""
    logits = mx.random.normal((5, VOCABULARY), key=mx.random.key(1))
    if broken is not None:
        logits[broken, 2] = value
    chunk = SimpleNamespace(of=lambda begin, end: logits[begin:end])
    scores, finite = score_chunk(Sampler(), None, 5, VOCABULARY, chunk)
    assert finite == (broken is None)
    if finite:
        assert scores.tolist() == logits[:4].tolist()
