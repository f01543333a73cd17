"""The user's settings of the KV cache: checked, and parsed into a frozen value.

`additional_config` arrives as a dict, from `--additional-config JSON` or from
`LLM(additional_config=...)`. The platform parses it when vLLM checks its configuration and the
worker parses the same dict with the same function, so both hold equal values.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    KEY_FORMATS,
    VALUE_FORMATS,
    FormatPair,
    parse_pair,
)
from vllm_metal.options import kv_store

DENSE_DTYPES = ("auto", "float16", "bfloat16")
"""Values of `--kv-cache-dtype` that select dense pages; `auto` is the model's type."""

PRESETS = {
    "turboquant_k8v4": parse_pair("q8_0/q4_0"),
    "turboquant_4bit_nc": parse_pair("q4_0/q4_0"),
    "turboquant_k3v4_nc": parse_pair("q3_0/q4_0"),
    "turboquant_3bit_nc": parse_pair("q3_0/q3_0"),
}
"""Values of `--kv-cache-dtype` that vLLM has for compressed pages, and their formats here."""

DEFAULT_FORMATS = parse_pair("q8_0/q3_0")
LOSSY_KEY_BITS = 2
"""Keys with this number of bits or fewer require `allow_lossy`."""


def parse(additional_config: object, cache_dtype: str) -> TurboQuantConfig | None:
    """The user's TurboQuant choice; None for dense pages.

    Args:
        additional_config: vLLM's setting of that name, which may be any object there.
        cache_dtype: `--kv-cache-dtype`.

    Raises:
        UserError: with every reason at once, each naming the key, the value and what is allowed.
    """
    if additional_config is not None and not isinstance(additional_config, Mapping):
        raise UserError(
            "The KV cache settings are not valid",
            [f"additional_config: {additional_config!r} is not a JSON object"],
        )
    given = dict(additional_config or {})
    allowed_keys = ", ".join((*_CHECKS, *kv_store.KEYS))
    reasons = [
        f"additional_config: unknown key {key!r} (allowed keys: {allowed_keys})"
        for key in given
        if key not in (*_CHECKS, *kv_store.KEYS)
    ]
    reasons += kv_store.problems(given, "additional_config")
    for key, check in _CHECKS.items():
        if key in given and (problem := check(given[key])):
            reasons.append(f"additional_config: {key}: {problem}")
    preset = PRESETS.get(cache_dtype)
    if preset is None and cache_dtype not in DENSE_DTYPES:
        allowed = ", ".join((*DENSE_DTYPES, *PRESETS))
        reasons.append(f"--kv-cache-dtype {cache_dtype} is not supported (allowed: {allowed})")
    enabled = given.get("turboquant", preset is not None)
    if preset and (enabled is False or "k_quant" in given or "v_quant" in given):
        reasons.append(
            f"--kv-cache-dtype {cache_dtype} already selects k_quant {preset.key.name} and v_quant "
            f"{preset.value.name}: give the formats in one place only"
        )
    if not enabled and (idle := [key for key in given if key in _CHECKS and key != "turboquant"]):
        reasons.append(
            f'additional_config: {", ".join(idle)}: no effect without "turboquant": true'
        )
    if reasons:
        raise UserError("The KV cache settings are not valid", reasons)
    if not enabled:
        return None
    default = preset or DEFAULT_FORMATS
    formats = FormatPair(
        KEY_FORMATS[given["k_quant"]] if "k_quant" in given else default.key,
        VALUE_FORMATS[given["v_quant"]] if "v_quant" in given else default.value,
    )
    if formats.key.bits <= LOSSY_KEY_BITS and not given.get("allow_lossy"):
        raise UserError(
            "additional_config is not valid",
            [
                f"k_quant: {formats.key.name!r} loses most of the model's quality and requires "
                '"allow_lossy": true'
            ],
        )
    return TurboQuantConfig(
        formats,
        reproducible=given.get("reproducible", False),
        **_skip_settings(given.get("skip_layers", [])),
    )


def dense_dtype(cache_dtype: str, model_dtype: Any) -> Any:
    """Element type of dense pages: `--kv-cache-dtype` where it names one, else the model's."""
    named = cache_dtype in DENSE_DTYPES and cache_dtype != "auto"
    return cache_dtype if named else model_dtype


def _check_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{value!r} is not true or false"


def _check_format(formats: Mapping[str, Any]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in formats:
            return None
        return f"{value!r} is not known (allowed: {', '.join(formats)})"

    return check


def _check_skip_layers(value: Any) -> str | None:
    if isinstance(value, list) and all(_is_count(layer) for layer in value):
        return None
    if isinstance(value, dict) and set(value) == {"boundary"} and _is_count(value["boundary"]):
        return None
    return f'{value!r} is not a list of layer indices or {{"boundary": COUNT}}'


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _skip_settings(value: list[int] | dict[str, int]) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {"skip_layers": tuple(value)}


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "turboquant": _check_bool,
    "k_quant": _check_format(KEY_FORMATS),
    "v_quant": _check_format(VALUE_FORMATS),
    "skip_layers": _check_skip_layers,
    "allow_lossy": _check_bool,
    "reproducible": _check_bool,
}
