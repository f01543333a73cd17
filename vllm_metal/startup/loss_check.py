"""What the compressed cache costs the model that is served, measured before the first request.

Tables of other models say little about this one: keys with biases, or a head that hardly attends,
may lose so much that the model still writes fluent text with other answers in it. So the model
reads a few hundred tokens twice, through dense pages and through pages of the chosen formats, and
the two next-token distributions are compared at every token. The text is the one that the keys are
calibrated on, so the loss is that of a text that suits the constants, at the first positions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import prefill_metadata
from vllm_metal.model.model_binding import ModelBinding, RowLogits

logger = logging.getLogger("vllm.metal.startup")

TOKENS = 256
"""Tokens that are read. The text has more."""

WARN_KLD = 0.05
"""Mean KL divergence, nats, from which the server warns: more than one most likely token in ten is
then another one."""

REFUSE_KLD = 0.5
"""Mean KL divergence, nats, from which the server does not start unless `allow_lossy` is given."""

_ROWS = 32
"""Rows of logits that are computed at a time: a vocabulary may have 260,000 entries."""


@dataclass(frozen=True)
class CompressionLoss:
    """How far compressed pages move the next-token distribution."""

    kld: float
    """Mean KL divergence from the dense pages' distribution, nats; infinite where compressed pages
    give numbers that are not finite and dense pages do not."""
    same_token: float
    """Part of the tokens after which the most likely next token is the same."""
    tokens: int
    """Tokens that were compared; 0 where dense pages give no finite numbers either."""

    def __str__(self) -> str:
        return (
            f"mean KL divergence {self.kld:.4f} nats from dense pages, the same most likely token "
            f"after {self.same_token:.1%} of {self.tokens} tokens of the calibration text"
        )


def measure_loss(
    binding: ModelBinding,
    dense: Sequence[AttentionBackend],
    compressed: Sequence[AttentionBackend],
    token_ids: Sequence[int],
) -> CompressionLoss:
    """Compares compressed pages with dense ones on a text.

    Args:
        binding: the model.
        dense: the reference's backends, one for each layer.
        compressed: backends that read a chunk's own keys and values compressed (`reproducible`).
        token_ids: read in one chunk.
    """
    expected, found = (_read(binding, backends, token_ids) for backends in (dense, compressed))
    divergences, same = [], []
    for begin in range(0, len(token_ids), _ROWS):
        end = min(begin + _ROWS, len(token_ids))
        reference, actual = (
            log_softmax(rows.of(begin, end).astype(mx.float32)) for rows in (expected, found)
        )
        kld = kl_divergence(reference, actual)
        # A distribution that is not one has no divergence; that of the reference is no loss.
        kld = mx.where(mx.isnan(kld) & ~mx.isnan(reference).any(axis=-1), mx.inf, kld)
        divergences.append(np.array(kld))
        same.append(np.array(mx.argmax(reference, axis=-1) == mx.argmax(actual, axis=-1)))
    kld, same_token = np.concatenate(divergences), np.concatenate(same)
    compared = ~np.isnan(kld)
    if not compared.any():
        return CompressionLoss(0.0, 1.0, 0)
    mean = float(kld[compared].mean())
    return CompressionLoss(mean, float(same_token[compared].mean()), int(compared.sum()))


def judge(loss: CompressionLoss, formats: str, accepted: bool) -> None:
    """Says what the formats cost, and warns or refuses where that is much.

    Args:
        loss: what was measured.
        formats: the formats' names, for the messages.
        accepted: whether the user has accepted any loss (`allow_lossy`).

    Raises:
        UserError: the loss is `REFUSE_KLD` or more and not accepted.
    """
    if loss.tokens == 0:  # the model's own logits are not numbers, which `decode_probe` refuses
        return
    if loss.kld < WARN_KLD:
        logger.info("TurboQuant %s on this model: %s", formats, loss)
        return
    if loss.kld >= REFUSE_KLD and not accepted:
        raise UserError(
            f"TurboQuant {formats} changes what this model says",
            [
                f"{loss} (allowed: less than {REFUSE_KLD} nats). Choose formats of more bits, keep "
                'layers dense with "skip_layers", or accept the loss with "allow_lossy": true'
            ],
        )
    logger.warning(
        "TurboQuant %s changes the answers of this model noticeably: %s. Formats of more bits lose "
        "less, above all for the keys",
        formats,
        loss,
    )


def _read(
    binding: ModelBinding, backends: Sequence[AttentionBackend], token_ids: Sequence[int]
) -> RowLogits:
    """The model's logits after each token of a text that it reads over pages of its own."""
    block_size = min((backend.block_size for backend in backends), default=len(token_ids))
    num_blocks = math.ceil(len(token_ids) / block_size)
    kv_cache = KVCache(backends, 1 + num_blocks, binding.states)
    tables = [np.arange(1, 1 + num_blocks, dtype=np.int32)] * len(kv_cache.groups)
    metadata = prefill_metadata(kv_cache.groups, tables, 0, len(token_ids))
    rows = binding.bind(kv_cache).forward_to_head(mx.array([list(token_ids)]), metadata)
    kv_cache.evaluate(rows.hidden)
    return rows


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities of each row, [L, vocabulary]."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(expected: mx.array, actual: mx.array) -> mx.array:
    """Of each row of log-probabilities, [L, vocabulary] to [L]."""
    return mx.sum(mx.exp(expected) * (expected - actual), axis=-1)
