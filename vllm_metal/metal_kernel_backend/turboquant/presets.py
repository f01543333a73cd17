"""Names that users bring from elsewhere for a pair of formats, or for one format.

A preset is a name for a pair: vLLM's `turboquant_*` names, the average bits of a code as the papers
count them (`2.5bit`, `3.5bit`), and `k4v2`, the bits of a key's and of a value's code, for every
pair whose loss is measured. `4bit` names one format, of keys or of values.

A name stands for the nearest formats here, which are not those of the program that it comes from.
The server therefore says at start what it took a name for, and at which measured loss.
"""

from collections.abc import Mapping

from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import (
    DEGREE,
    Format,
    FormatPair,
    parse_pair,
)
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS, measured_loss

VLLM_PRESETS = {
    "turboquant_k8v4": parse_pair("q8_0/q4_0"),
    "turboquant_4bit_nc": parse_pair("q4_0/q4_0"),
    "turboquant_k3v4_nc": parse_pair("q3_0/q4_0"),
    "turboquant_3bit_nc": parse_pair("q3_0/q3_0"),
}
"""Values of `--kv-cache-dtype` that vLLM has for compressed pages, and their formats here."""

AVERAGE_BITS = {
    "2.5bit": parse_pair("q3_0/q2_0"),
    "3.5bit": parse_pair("q4_0/q3_0"),
}
"""Bits of a code on average over keys and values. The papers reach such an average by giving some
channels of a vector one bit more; here keys have one bit more than values."""

PRESETS: dict[str, FormatPair] = {
    **VLLM_PRESETS,
    **AVERAGE_BITS,
    **{f"k{key.bits}v{value.bits}": FormatPair(key, value) for key, value in SHOWN_PAIRS},
}
"""Every name that `"preset"` takes."""

_FORMAT_NAMES = {f"{bits}bit": f"q{bits}_0" for bits in DEGREE}


def format_by_name(name: object, formats: Mapping[str, Format]) -> Format | None:
    """The format that `name` means for keys or for values; None for no format's name.

    Args:
        name: what the user wrote: the name of a format, or `4bit` for `q4_0`.
        formats: `KEY_FORMATS` or `VALUE_FORMATS`.
    """
    return formats.get(_FORMAT_NAMES.get(name, name)) if isinstance(name, str) else None


def allowed_formats(formats: Mapping[str, Format]) -> str:
    """The names that `format_by_name` takes, for an error message."""
    return ", ".join((*formats, *_FORMAT_NAMES))


def describe(turboquant: TurboQuantConfig, model: str, head_size: int | None = None) -> str:
    """One line for the log: the formats, the name that chose them, and their measured loss.

    Args:
        turboquant: the user's choice.
        model: name or folder of the model that is served.
        head_size: elements of one of its keys; None where it has none.
    """
    key, value = turboquant.formats
    name = f"preset {turboquant.preset}: " if turboquant.preset else ""
    loss = measured_loss(turboquant.formats, model, head_size)
    measured = f"measured loss: {loss}" if loss else "the loss of this pair has not been measured"
    return f"{name}k_quant {key.name}, v_quant {value.name}; {measured}"
