"""`--speculative-config`: which ways of speculation are served."""

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_metal.errors import UserError
from vllm_metal.options.check import default_of

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

METHODS = ("ngram", "suffix")

MOST_DRAFTS = 7
"""Drafts of a request in a step. The decode kernels take them and the token before them together:
`metal_kernel_backend.paged.launcher.MAX_QUERY_TOKENS`, which a test compares."""

_SERVED = {
    "method",
    "num_speculative_tokens",
    "prompt_lookup_max",
    "prompt_lookup_min",
    "suffix_decoding_max_tree_depth",
    "suffix_decoding_max_cached_requests",
    "suffix_decoding_max_spec_factor",
    "suffix_decoding_min_token_prob",
}
"""Keys that have an effect."""

_SET_BY_VLLM = {
    "model",
    "enforce_eager",
    "target_model_config",
    "target_parallel_config",
    "draft_model_config",
    "draft_parallel_config",
    "draft_load_config",
    "draft_tensor_parallel_size",
    "max_model_len",
    "quantization",
}
"""Keys that vLLM fills in for every method, or that only those of a model have."""


def refusals(vllm_config: "VllmConfig") -> list[str]:
    """Why this speculation is not served: one line for each reason, naming key and value."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return []
    reasons = []
    if speculative.method not in METHODS:
        reasons.append(
            f"--speculative-config: method {speculative.method!r} is not supported"
            f"{_why_not(speculative)} (allowed: {', '.join(METHODS)})"
        )
    count = speculative.num_speculative_tokens
    if count is not None and count > MOST_DRAFTS:
        reasons.append(
            f"--speculative-config: num_speculative_tokens {count} is not supported: the decode "
            f"kernels take a token and {MOST_DRAFTS} drafts of a request (allowed: 1 to "
            f"{MOST_DRAFTS})"
        )
    for name, value in _others(speculative):
        reasons.append(f"--speculative-config: {name} {value} is not supported")
    if vllm_config.model_config is not None and vllm_config.model_config.logits_processors:
        reasons.append(
            "--logits-processors is not supported with --speculative-config: vLLM does not load "
            "them then"
        )
    return reasons


def require_attention_alone(vllm_config: "VllmConfig") -> None:
    """For a model with recurrent state. Raises UserError where it is to speculate."""
    _require(
        vllm_config, "it has recurrent state, which cannot go back to before a draft that is wrong"
    )


def require_batches(vllm_config: "VllmConfig", reason: str) -> None:
    """For a model that decodes one request at a time. Raises UserError where it is to speculate.

    Args:
        reason: why it does.
    """
    _require(vllm_config, f"it takes one position in a forward pass and not several ({reason})")


def _require(vllm_config: "VllmConfig", reason: str) -> None:
    if vllm_config.speculative_config is not None:
        model = vllm_config.model_config.model
        raise UserError(
            "This configuration cannot be served",
            [f"--speculative-config is not supported for {model}: {reason}"],
        )


def _why_not(speculative: "SpeculativeConfig") -> str:
    if speculative.method == "draft_model":
        return ": no second model is loaded that would draft"
    if speculative.use_eagle() or speculative.method in ("medusa", "mlp_speculator"):
        return ": mlx-lm does not load the layers that draft"
    return ""


def _others(speculative: "SpeculativeConfig") -> list[tuple[str, Any]]:
    """Keys without a meaning here that have another value than the default."""
    names = {f.name for f in dataclasses.fields(speculative) if f.init} - _SERVED - _SET_BY_VLLM
    values = {name: getattr(speculative, name) for name in names}
    return sorted((n, v) for n, v in values.items() if v != default_of(speculative, n))
