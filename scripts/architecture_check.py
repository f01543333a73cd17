"""Checks one architecture: a tiny random model through `ModelBinding` and its pages.

The expected logits are those of mlx-lm's own caches, fed with the same chunks. TurboQuant is held
to the same model on the same caches with keys and values through the codec. What is left are
rounding errors, and now and then a code that they tip over: most tokens agree as in float32, and
those after a tipped code by what one code is worth, more where it changes the choice of experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm_reference import CacheUse, kinds, reference_logits
from tiny_architectures import config_of, tiny_model

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.config import TurboQuantConfig
from vllm_metal.errors import UserError
from vllm_metal.evaluation.sequence import PagedSequence
from vllm_metal.key_samples import collect_key_samples
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.selection import make_backends
from vllm_metal.metal_kernel_backend.turboquant.calibration import calibrate
from vllm_metal.warm_up import takes_batched_offsets

CHUNK_LENGTHS = (17, 12, 8)
"""Tokens of the chunks of the prompt. The windows of the tiny models are 8."""
PROMPT = sum(CHUNK_LENGTHS)
DECODE_STEPS = 5
LENGTH = PROMPT + DECODE_STEPS
BATCH = (4, 20, PROMPT)
"""Positions that are decoded together."""
BLOCK_SIZE = 16
VOCABULARY = 96
MAX_MODEL_LEN = 256

FORMATS = (("q8_0", "q4_0"), ("q4_0", "q4_0"))
DENSE_BOUND = 3e-5
"""Largest difference from mlx-lm's logits, in standard deviations of the logits."""
TURBOQUANT_BOUND = 5e-2
"""The same, from the logits with keys and values through the codec, for every token."""
TURBOQUANT_MEDIAN_BOUND = 1e-4
"""The same, for the better half of the tokens: those that no tipped code has reached."""


def check(name: str) -> dict[str, Any]:
    """What the architecture is and whether it is served, as JSON holds it."""
    model = tiny_model(name)
    tokens = mx.random.randint(0, VOCABULARY, (LENGTH,), key=mx.random.key(1)).tolist()
    chunks = _chunks(tokens)
    reference, failure, use, forwards = None, "", CacheUse(), 0
    try:
        reference, use = reference_logits(model, chunks)
        forwards = len(chunks)
    except Exception as error:
        failure = f"mlx-lm's own forward pass fails here ({type(error).__name__}: {error})"
    found = kinds(model, config_of(name), use, forwards)
    try:
        binding = ModelBinding(model)
    except UserError as error:
        return {"kinds": found, **_both("refused", error.reasons)}
    if reference is None:
        return {"kinds": found, **_both("not checked", [failure])}
    return {
        "kinds": found,
        "dense": _outcome(lambda: _check_dense(binding, tokens, reference)),
        "turboquant": _outcome(lambda: _check_turboquant(model, binding, tokens, reference)),
    }


def _both(status: str, reasons: Sequence[str]) -> dict[str, Any]:
    outcome = {"status": status, "reasons": list(reasons)}
    return {"dense": outcome, "turboquant": outcome}


def _outcome(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except UserError as error:
        return {"status": "refused", "reasons": error.reasons}
    except Exception as error:
        return {"status": "wrong", "reasons": [f"{type(error).__name__}: {error}"]}


def _judged(problems: Sequence[str], figures: dict[str, Any]) -> dict[str, Any]:
    if problems:
        return {"status": "wrong", "reasons": list(dict.fromkeys(problems)), **figures}
    return {"status": "served", **figures}


def _check_dense(
    binding: ModelBinding, tokens: Sequence[int], reference: np.ndarray
) -> dict[str, Any]:
    paged = PagedModel(binding, make_backends(binding.layers, BLOCK_SIZE, mx.float32, None, list))
    difference = _difference(paged.logits(tokens), reference)
    if paged.batched_decode:
        together = paged.decode_together(tokens)
        difference = max(difference, _difference(together, reference[list(BATCH)]))
    problems = [] if difference < DENSE_BOUND else ["the logits are not mlx-lm's"]
    figures = {"difference": _rounded(difference), "batched_decode": paged.batched_decode}
    return _judged(problems, figures)


def _check_turboquant(
    model: nn.Module, binding: ModelBinding, tokens: Sequence[int], reference: np.ndarray
) -> dict[str, Any]:
    constants = calibrate(
        lambda token_ids, offset: collect_key_samples(binding, token_ids, offset),
        lambda text: [octet % VOCABULARY for octet in text.encode()],
        MAX_MODEL_LEN,
    )
    figures: dict[str, Any] = {"difference": 0.0, "loss": {}}
    problems = []
    for formats in FORMATS:
        backends = make_backends(
            binding.layers,
            BLOCK_SIZE,
            mx.float32,
            TurboQuantConfig(*formats),
            lambda: constants,
        )
        paged = PagedModel(binding, backends)
        logits = paged.logits(tokens)
        expected, _ = reference_logits(model, _chunks(tokens), backends)
        difference = _difference(logits, expected)
        median = np.median([_difference(a, b) for a, b in zip(logits, expected, strict=True)])
        if not (difference < TURBOQUANT_BOUND and median < TURBOQUANT_MEDIAN_BOUND):
            problems.append("the logits' error is not the codec's")
        if paged.batched_decode:
            together, alone = paged.decode_together(tokens), paged.decode_in_turn(tokens)
            if not np.array_equal(together, alone):
                by = _difference(together, alone)
                problems.append(f"a request's logits depend on its batch, by {by:.0e}")
        figures["difference"] = max(figures["difference"], _rounded(difference))
        figures["loss"]["/".join(formats)] = _rounded(_difference(logits, reference))
        figures["batched_decode"] = paged.batched_decode
    return _judged(problems, figures)


class PagedModel:
    """A bound model with its backends."""

    def __init__(self, binding: ModelBinding, backends: Sequence[AttentionBackend]):
        self.binding, self.backends = binding, backends
        probe = KVCache(backends, 16, binding.states)
        binding.bind(probe)
        self.batched_decode = takes_batched_offsets(binding, probe)
        """Whether rows at several positions are decoded together."""

    def logits(self, tokens: Sequence[int]) -> np.ndarray:  # [LENGTH, vocabulary]
        """The prompt in chunks, then token by token."""
        sequence, rows = self._prefilled(tokens)
        for position in range(PROMPT, LENGTH):
            rows.append(sequence.decode_at(tokens, [position]))
        return np.array(mx.concatenate(rows))

    def decode_together(self, tokens: Sequence[int]) -> np.ndarray:  # [len(BATCH), vocabulary]
        """One decode step at the positions of BATCH."""
        sequence = self._stored(tokens)
        return np.array(sequence.decode_at(tokens, BATCH))

    def decode_in_turn(self, tokens: Sequence[int]) -> np.ndarray:  # [len(BATCH), vocabulary]
        """A decode step for each position of BATCH."""
        sequence = self._stored(tokens)
        return np.array(mx.concatenate([sequence.decode_at(tokens, [p]) for p in BATCH]))

    def _stored(self, tokens: Sequence[int]) -> PagedSequence:
        """A sequence to decode from, empty where a recurrent state has each row computed anew."""
        if self.binding.states:
            return PagedSequence(self.binding, self.backends, LENGTH)
        return self._prefilled(tokens)[0]

    def _prefilled(self, tokens: Sequence[int]) -> tuple[PagedSequence, list[mx.array]]:
        sequence = PagedSequence(self.binding, self.backends, LENGTH)
        chunks = _chunks(tokens)[: len(CHUNK_LENGTHS)]
        return sequence, [rows for chunk in chunks for rows in sequence.prefill(chunk)]


def _chunks(tokens: Sequence[int]) -> list[Sequence[int]]:
    """The chunks of the prompt, then single tokens."""
    lengths = [*CHUNK_LENGTHS, *[1] * DECODE_STEPS]
    ends = np.cumsum(lengths).tolist()
    return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in standard deviations of `expected`; infinite where one is no number."""
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(logits), finite):
        return float("inf")
    return float(np.abs(logits[finite] - expected[finite]).max() / expected[finite].std())


def _rounded(number: float) -> float:
    """One significant digit: what the figure means, whatever the machine."""
    return float(f"{number:.0e}")
