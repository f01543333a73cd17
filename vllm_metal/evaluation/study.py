"""The measurements of `vllm-metal eval`: each candidate against the dense cache, on one model.

A candidate's backends are those that the server would choose on this machine, kernels included
where there are some. Beside the windows stands one long window: the constants of the keys are
calibrated on a short text and must hold far from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.errors import UserError
from vllm_metal.evaluation.attention_error import attention_error
from vllm_metal.evaluation.block_affine import BlockAffine
from vllm_metal.evaluation.fidelity import compare
from vllm_metal.evaluation.needle import Decode, Encode, Needle, find_needles
from vllm_metal.kv_cache.capacity import DENSE_BITS
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.calibration import TEXT, calibrate
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import FormatPair
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.key_samples import collect_key_samples

BLOCK_SIZE = 16

Make = Callable[[], Sequence[AttentionBackend]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """The candidates and texts of a study."""

    pairs: Sequence[FormatPair]
    """The formats of each candidate."""
    block_affine: Sequence[tuple[int, int]] = ()
    """Bits of block-affine keys and Lloyd-Max values, measured as further candidates."""
    windows: int = 3
    window_tokens: int = 1024
    long_window_tokens: int = 0
    """Tokens of one window more; 0 for none."""
    max_model_len: int | None = None
    """Length that keys are calibrated for; the longest window if not given."""
    haystacks: Sequence[int] = ()
    """Context lengths of the needle test, tokens; none for no such test."""

    def require(self, num_tokens: int) -> None:
        """Raises UserError unless a text of `num_tokens` tokens is long enough for every part."""
        needs = {
            f"{self.windows} windows of {self.window_tokens}": self.windows * self.window_tokens,
            "the long window": self.long_window_tokens,
            "the needle test": max(self.haystacks, default=0),
        }
        unmet = [f"{need} for {part}" for part, need in needs.items() if num_tokens < need]
        if unmet:
            raise UserError(f"The text has {num_tokens} tokens; needed: {', '.join(unmet)}")


def measure(
    study: Study,
    binding: ModelBinding,
    token_ids: Sequence[int],
    encode: Encode,
    decode: Decode,
    progress: Progress,
    beginning: Sequence[int] = (),
) -> dict:
    """Runs the study.

    Args:
        study: what to measure.
        binding: the model, its weights in float32.
        token_ids: the text.
        encode: text to token ids, without special tokens.
        decode: token ids to text.
        progress: told what is being run.
        beginning: tokens that every text begins with, as prompts of a server do; they count among
            the tokens of a window.

    Returns:
        `head_size` of the first layer, `dense_perplexity` and, under `pairs`, the figures of each
        candidate.

    Raises:
        UserError: the text is too short.
    """
    study.require(len(token_ids))
    stride = len(token_ids) // study.windows

    def window(start: int, length: int) -> list[int]:
        return [*beginning, *token_ids[start:]][:length]

    windows = [window(i * stride, study.window_tokens) for i in range(study.windows)]
    dense = _backends(binding, None, neutral_constants(binding.layers))
    longest = study.max_model_len or study.window_tokens
    candidates = _candidates(study, binding, encode, beginning, longest)
    fidelity, perplexity = compare(binding, dense, candidates, windows, progress)
    results = {}
    for name, make in candidates.items():
        bits = make()[0].bits_per_element
        sizes = {"bits_per_element": bits, "ratio": DENSE_BITS / bits}
        results[name] = sizes | fidelity[name].summary()
        progress(f"attention error: {name}")
        results[name]["attention_error"] = attention_error(binding, make(), windows[0])
    if study.long_window_tokens:
        length = study.long_window_tokens
        longest = study.max_model_len or length
        candidates = _candidates(study, binding, encode, beginning, longest)
        fidelity, _ = compare(binding, dense, candidates, [window(0, length)], progress)
        for name in candidates:
            results[name]["long_window_kld"] = fidelity[name].summary()["kld"]
    if study.haystacks:

        def find(backends: Sequence[AttentionBackend]) -> list[Needle]:
            texts = encode, decode, study.haystacks
            return find_needles(binding, backends, token_ids, *texts, beginning)

        progress("needles: dense")
        expected = find(dense)
        for name, make in candidates.items():
            progress(f"needles: {name}")
            results[name] |= _needle_figures(find(make()), expected)
    head_sizes = [shape.head_size for shape in binding.layers]
    return {"head_size": head_sizes[0], "dense_perplexity": perplexity, "pairs": results}


def _candidates(
    study: Study,
    binding: ModelBinding,
    encode: Encode,
    beginning: Sequence[int],
    max_model_len: int,
) -> dict[str, Make]:
    constants = calibrate(
        lambda ids, offset: collect_key_samples(binding, ids, offset),
        beginning,
        encode(TEXT),
        max_model_len,
    )

    def compressed(pair: FormatPair) -> Make:
        config = TurboQuantConfig(pair, reproducible=True)
        return lambda: _backends(binding, config, lambda: constants)

    def block_affine(bits: tuple[int, int]) -> Make:
        return lambda: [BlockAffine(shape, BLOCK_SIZE, *bits) for shape in binding.layers]

    candidates = {str(pair): compressed(pair) for pair in study.pairs}
    for bits in study.block_affine:
        candidates["block-affine {}/{}".format(*bits)] = block_affine(bits)
    return candidates


def _backends(binding, config, constants) -> Sequence[AttentionBackend]:
    return make_backends(binding.layers, BLOCK_SIZE, mx.float32, config, constants)


def _needle_figures(found: Sequence[Needle], expected: Sequence[Needle]) -> dict[str, int]:
    """Counts of a candidate's answers and of the dense cache's."""
    return {
        "needles_found": sum(needle.found for needle in found),
        "needles_kept": sum(a.found for a, b in zip(found, expected, strict=True) if b.found),
        "needles_found_dense": sum(needle.found for needle in expected),
        "needles": len(expected),
    }
