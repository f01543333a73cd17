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
    Format,
    FormatPair,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.presets import (
    PRESETS,
    VLLM_PRESETS,
    allowed_formats,
    format_by_name,
)
from vllm_metal.options import kv_store

DENSE_DTYPES = ("auto", "float16", "bfloat16")
"""Values of `--kv-cache-dtype` that select dense pages; `auto` is the model's type."""

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
    named = _named_pairs(given, cache_dtype)
    if cache_dtype not in (*DENSE_DTYPES, *VLLM_PRESETS):
        allowed = ", ".join((*DENSE_DTYPES, *VLLM_PRESETS))
        reasons.append(f"--kv-cache-dtype {cache_dtype} is not supported (allowed: {allowed})")
    enabled = given.get("turboquant", bool(named) or "preset" in given)
    formats_given = [key for key in ("k_quant", "v_quant") if key in given]
    for option, pair in named.items():
        if enabled is False or formats_given or len(named) > 1:
            reasons.append(
                f"{option} already selects k_quant {pair.key.name} and v_quant "
                f"{pair.value.name}: give the formats in one place only"
            )
    if not enabled and (idle := [key for key in given if key in _CHECKS and key != "turboquant"]):
        reasons.append(
            f'additional_config: {", ".join(idle)}: no effect without "turboquant": true'
        )
    if reasons:
        raise UserError("The KV cache settings are not valid", reasons)
    if not enabled:
        return None
    default = next(iter(named.values()), DEFAULT_FORMATS)
    formats = FormatPair(
        format_by_name(given.get("k_quant"), KEY_FORMATS) or default.key,
        format_by_name(given.get("v_quant"), VALUE_FORMATS) or default.value,
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
        preset=given.get("preset") or (cache_dtype if named else None),
        accepts_loss=given.get("allow_lossy", False),
        reproducible=given.get("reproducible", False),
        **_skip_settings(given.get("skip_layers", [])),
    )


def _named_pairs(given: Mapping[str, Any], cache_dtype: str) -> dict[str, FormatPair]:
    """The pairs that are named as a whole, by the option that names each."""
    options = {
        f"--kv-cache-dtype {cache_dtype}": VLLM_PRESETS.get(cache_dtype),
        f"additional_config: preset {given.get('preset')!r}": _preset(given.get("preset")),
    }
    return {option: pair for option, pair in options.items() if pair is not None}


def dense_dtype(cache_dtype: str, model_dtype: Any) -> Any:
    """Element type of dense pages: `--kv-cache-dtype` where it names one, else the model's."""
    named = cache_dtype in DENSE_DTYPES and cache_dtype != "auto"
    return cache_dtype if named else model_dtype


def _check_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{value!r} is not true or false"


def _check_format(formats: Mapping[str, Format]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if format_by_name(value, formats) is not None:
            return None
        if _preset(value) is not None:
            return f'{value!r} names a pair of formats: write "preset": "{value}" in its place'
        return f"{value!r} is not known (allowed: {allowed_formats(formats)})"

    return check


def _preset(value: Any) -> FormatPair | None:
    return PRESETS.get(value) if isinstance(value, str) else None


def _check_preset(value: Any) -> str | None:
    if _preset(value) is not None:
        return None
    return f"{value!r} is not known (allowed: {', '.join(PRESETS)})"


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
    "preset": _check_preset,
    "k_quant": _check_format(KEY_FORMATS),
    "v_quant": _check_format(VALUE_FORMATS),
    "skip_layers": _check_skip_layers,
    "allow_lossy": _check_bool,
    "reproducible": _check_bool,
}
