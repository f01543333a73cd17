"""How far a compressed cache moves the model's next-token distribution.

Teacher-forced on a text: the dense cache gives the reference distribution at every position, and
each candidate is compared with it. A candidate reads every key and value through its pages, those
of the token itself too: its loss is that of a long generation, where nothing is exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.evaluation.sequence import PagedSequence
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.loss_check import kl_divergence, log_softmax

DECODE_POSITIONS = 16
"""Positions of a window at which the decode path is compared, too."""
FIRST_DECODE_POSITION = 8
MIN_WINDOW_TOKENS = FIRST_DECODE_POSITION + DECODE_POSITIONS
"""Tokens of a window at least, so that these positions differ."""

Backends = Sequence[AttentionBackend]


@dataclass
class Fidelity:
    """Figures of one candidate over all windows, one entry for each position."""

    kld: list[np.ndarray] = field(default_factory=list)
    """KL divergence from the reference distribution, nats."""
    loss_change: list[np.ndarray] = field(default_factory=list)
    """Change of the next token's negative log-likelihood, nats."""
    top1: list[np.ndarray] = field(default_factory=list)
    """Whether the most likely token is the reference's."""
    decode_kld: list[np.ndarray] = field(default_factory=list)
    """KL divergence of decode steps at `DECODE_POSITIONS` positions."""

    def summary(self) -> dict[str, float]:
        """Means, with standard errors where they are shown."""
        kld, change = np.concatenate(self.kld), np.concatenate(self.loss_change)
        ratio = float(np.exp(change.mean()))
        return {
            "kld": float(kld.mean()),
            "kld_standard_error": float(kld.std() / np.sqrt(kld.size)),
            "perplexity_ratio": ratio,
            "perplexity_ratio_standard_error": float(ratio * change.std() / np.sqrt(change.size)),
            "top1_agreement": float(np.concatenate(self.top1).mean()),
            "decode_kld": float(np.concatenate(self.decode_kld).mean()),
        }


def compare(
    binding: ModelBinding,
    reference: Backends,
    candidates: dict[str, Callable[[], Backends]],
    windows: Sequence[Sequence[int]],
    progress: Callable[[str], None],
) -> tuple[dict[str, Fidelity], float]:
    """Compares every candidate on every window.

    Args:
        binding: the model.
        reference: dense backends.
        candidates: name -> what makes its backends.
        windows: token ids.
        progress: told what is being run.

    Returns:
        the figures by candidate, and the reference's perplexity.
    """
    results = {name: Fidelity() for name in candidates}
    losses = []
    for number, window in enumerate(windows):
        progress(f"window {number + 1} of {len(windows)}: dense")
        expected = _log_probabilities(PagedSequence(binding, reference, len(window)), window)
        losses.append(_next_token_losses(expected, window))
        for name, make in candidates.items():
            progress(f"window {number + 1} of {len(windows)}: {name}")
            sequence = PagedSequence(binding, make(), len(window))
            _compare_window(sequence, window, expected, losses[-1], results[name])
    return results, float(np.exp(np.concatenate(losses).mean()))


def _compare_window(
    sequence: PagedSequence,
    window: Sequence[int],
    expected: list[mx.array],
    losses: np.ndarray,
    result: Fidelity,
) -> None:
    klds, tops, found = [], [], []
    for reference, logits in zip(expected, sequence.prefill(window), strict=True):
        actual = log_softmax(logits)
        klds.append(np.array(kl_divergence(reference, actual)))
        tops.append(np.array(mx.argmax(reference, axis=-1) == mx.argmax(actual, axis=-1)))
        found.append(actual)
    result.kld.append(np.concatenate(klds))
    result.top1.append(np.concatenate(tops))
    result.loss_change.append(_next_token_losses(found, window) - losses)
    last = len(window) - 1
    positions = np.linspace(FIRST_DECODE_POSITION, last, DECODE_POSITIONS).astype(int).tolist()
    actual = log_softmax(sequence.decode_at(window, positions))
    result.decode_kld.append(np.array(kl_divergence(_rows(expected, positions), actual)))


def _log_probabilities(sequence: PagedSequence, window: Sequence[int]) -> list[mx.array]:
    chunks = []
    for logits in sequence.prefill(window):
        chunks.append(log_softmax(logits))
        mx.eval(chunks[-1])
    return chunks


def _next_token_losses(chunks: list[mx.array], window: Sequence[int]) -> np.ndarray:
    """Negative log-likelihood of each next token, [len(window) - 1]."""
    losses, start = [], 0
    for chunk in chunks:
        targets = window[start + 1 : start + 1 + chunk.shape[0]]
        index = mx.array(list(targets))[:, None]
        taken = mx.take_along_axis(chunk[: len(targets)], index, axis=-1)
        losses.append(-np.array(taken[:, 0]))
        start += chunk.shape[0]
    return np.concatenate(losses)


def _rows(chunks: list[mx.array], positions: Sequence[int]) -> mx.array:
    size = chunks[0].shape[0]
    return mx.stack([chunks[position // size][position % size] for position in positions])
