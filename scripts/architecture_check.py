"""Checks one architecture: requests of a tiny random model through `ModelBinding` and its pages.

The expected logits are those of mlx-lm's own caches, one request at a time, fed with the same
chunks. TurboQuant is held to the same model on the same caches with keys and values through the
codec. What is left are rounding errors, and now and then a code that they tip over: most tokens
agree as in float32, and those after a tipped code by what one code is worth, more where it changes
the choice of experts.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm_reference import CacheUse, kinds, reference_logits
from paged_requests import PagedRequests
from tiny_architectures import STAND_INS, config_of, tiny_model

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.selection import make_backends
from vllm_metal.metal_kernel_backend.turboquant.calibration import TEXT, calibrate
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.key_samples import collect_key_samples

CHUNKS = ((17, 12, 8), (4,), (9, 11))
"""Tokens of the chunks of each prompt. The windows of the tiny models are 8."""
DECODE_STEPS = 4
ALONE = 2
"""The request that is served alone, too."""
BLOCK_SIZE = 16
VOCABULARY = 96
CALIBRATION_TOKENS = 256

SEEDS = 3
"""Sets of random weights."""
NO_METAL = "No Metal back-end"
"""In MLX's message for a kernel that another machine could run."""

FORMATS = (parse_pair("q8_0/q4_0"), parse_pair("q4_0/q4_0"))
DENSE_BOUND = 3e-5
"""Largest difference from mlx-lm's logits, in standard deviations of the logits."""
TURBOQUANT_MEDIAN_BOUND = 1e-4
"""The same, from the logits with keys and values through the codec, for the better half of the
tokens: those that no tipped code has reached."""
TURBOQUANT_SHARE_BOUND = 0.1
"""Largest difference from them, as a share of what the codec itself does to the logits."""
CHUNKING_BOUND = 1e-3
"""The same, of mlx-lm's logits for a prompt in chunks and in one piece: more is no rounding."""

Logits = list[np.ndarray]
"""[T, vocabulary] of each request: of its prompt, then of its decode steps."""


def check(name: str) -> dict[str, Any]:
    """What the architecture is and whether it is served, as JSON holds it.

    A code that is tipped over, or a choice of experts, can be worth more than TurboQuant is
    allowed. It is chance, so what is wrong with one set of weights is tried with others; what is
    wrong in the plugin is wrong with all.
    """
    result = _check(name, 0)
    for seed in range(1, SEEDS):
        if result["turboquant"]["status"] != "wrong":
            break
        again = _check(name, seed)["turboquant"]
        if again["status"] != "wrong":
            result["turboquant"] = again
    return result


def _check(name: str, seed: int) -> dict[str, Any]:
    model = tiny_model(name, seed)
    reference, failure, use = None, "", CacheUse()
    notes = [STAND_INS[name]] if name in STAND_INS else []
    try:
        reference, use = _reference(model)
        whole, _ = reference_logits(model, _prompts()[:1])
        if _difference(reference[:1], [whole]) > CHUNKING_BOUND:
            notes.append("mlx-lm's own logits depend on how a prompt is cut into chunks")
    except Exception as error:
        failure = f"mlx-lm's own forward pass fails here ({type(error).__name__}: {error})"
    about = {"kinds": kinds(model, config_of(name), use), "notes": notes}
    if NO_METAL in failure:
        return about | _both("not checked", ["mlx-lm's own code for it needs Metal"])
    try:
        binding = ModelBinding(model)
    except UserError as error:
        return about | _both("refused", error.reasons)
    if reference is None:
        return about | _both("not checked", [failure])
    return about | {
        "dense": _outcome(lambda: _check_dense(binding, reference)),
        "turboquant": _outcome(lambda: _check_turboquant(model, binding, reference)),
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


def _check_dense(binding: ModelBinding, reference: Logits) -> dict[str, Any]:
    states = binding.states
    backends = make_backends(binding.layers, BLOCK_SIZE, mx.float32, None, list, states)
    logits, batched = _served(binding, backends)
    difference = _difference(logits, reference)
    problems = [] if difference < DENSE_BOUND else ["the logits are not mlx-lm's"]
    return _judged(problems, {"difference": _rounded(difference), "batched_decode": batched})


def _check_turboquant(model: nn.Module, binding: ModelBinding, reference: Logits) -> dict[str, Any]:
    @cache
    def constants() -> Sequence[Any]:
        return calibrate(
            lambda token_ids, offset: collect_key_samples(binding, token_ids, offset),
            [],
            [octet % VOCABULARY for octet in TEXT.encode()],
            CALIBRATION_TOKENS,
        )

    figures: dict[str, Any] = {"difference": 0.0, "loss": {}}
    problems = []
    for formats in FORMATS:
        config = TurboQuantConfig(formats)
        backends = make_backends(
            binding.layers, BLOCK_SIZE, mx.float32, config, constants, binding.states
        )
        if not any(backend.compressed for backend in backends):
            reason = "no layer has keys and values, so it changes nothing"
            return {"status": "nothing to compress", "reasons": [reason]}
        logits, batched = _served(binding, backends)
        expected, _ = _reference(model, backends)
        difference = _difference(logits, expected)
        loss = _difference(expected, reference)
        median = _median_difference(logits, expected)
        if not (median < TURBOQUANT_MEDIAN_BOUND and difference < TURBOQUANT_SHARE_BOUND * loss):
            problems.append("the logits' error is not the codec's")
        alone, _ = _served(binding, backends, [ALONE])
        if not np.array_equal(logits[ALONE], alone[0]):
            by = _difference(logits[ALONE : ALONE + 1], alone)
            problems.append(f"a request's logits depend on the others, by {by:.0e}")
        figures["difference"] = max(figures["difference"], _rounded(difference))
        figures["loss"][str(formats)] = _rounded(loss)
        figures["batched_decode"] = batched
    return _judged(problems, figures)


def _prompts() -> list[list[int]]:
    """Token ids of each request, those of its decode steps included."""
    lengths = [sum(chunks) + DECODE_STEPS for chunks in CHUNKS]
    return [
        np.array(mx.random.randint(0, VOCABULARY, (length,), key=mx.random.key(i))).tolist()
        for i, length in enumerate(lengths)
    ]


def _reference(
    model: nn.Module, backends: Sequence[AttentionBackend] = ()
) -> tuple[Logits, CacheUse]:
    """What mlx-lm gives for each request, and how it used its caches for the last one."""
    runs = [
        reference_logits(model, _forwards(request, token_ids), backends)
        for request, token_ids in enumerate(_prompts())
    ]
    return [logits for logits, _ in runs], runs[-1][1]


def _forwards(request: int, token_ids: Sequence[int]) -> list[Sequence[int]]:
    """The tokens of each forward pass of a request: chunks of its prompt, then single ones."""
    lengths = [*CHUNKS[request], *[1] * DECODE_STEPS]
    ends = np.cumsum(lengths).tolist()
    return [token_ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _served(
    binding: ModelBinding,
    backends: Sequence[AttentionBackend],
    requests: Sequence[int] = range(len(CHUNKS)),
) -> tuple[Logits, bool]:
    """Logits of each request, and whether they were decoded together."""
    prompts = _prompts()
    paged = PagedRequests(binding, backends, len(prompts), max(map(len, prompts)))
    logits: list[list[np.ndarray]] = [[] for _ in requests]
    for rows, request in zip(logits, requests, strict=True):
        start = 0
        for chunk in _forwards(request, prompts[request])[: len(CHUNKS[request])]:
            rows.append(paged.prefill(request, chunk, start))
            start += len(chunk)
    for step in range(DECODE_STEPS):
        positions = [sum(CHUNKS[request]) + step for request in requests]
        newest = [prompts[r][p] for r, p in zip(requests, positions, strict=True)]
        decoded = paged.decode(requests, newest, positions)
        for rows, row in zip(logits, decoded, strict=True):
            rows.append(row[None])
    return [np.concatenate(rows) for rows in logits], paged.batched_decode


def _difference(logits: Logits, expected: Logits) -> float:
    """Largest difference in standard deviations of what is expected; infinite where one of the
    two is no finite number."""
    return max(_differences(logits, expected))


def _median_difference(logits: Logits, expected: Logits) -> float:
    return float(np.median(_differences(logits, expected)))


def _differences(logits: Logits, expected: Logits) -> list[float]:
    """`_difference` of each token."""
    found, right = np.concatenate(logits), np.concatenate(expected)
    finite = np.isfinite(right)
    deviation = right[finite].std()
    return [
        float(np.abs(a[f] - b[f]).max() / deviation) if (np.isfinite(a) == f).all() else np.inf
        for a, b, f in zip(found, right, finite, strict=True)
    ]


def _rounded(number: float) -> float:
    """One significant digit: what the figure means, whatever the machine."""
    return float(f"{number:.0e}")
