"""Which formats of quantised weights mlx-lm reads, and for which models.

mlx-lm's own format says so under `quantization` in `config.json` and is served for every model.
Others are named by `quant_method` in `quantization_config`. mlx-lm reads some of them, most in the
code of single models. What it does not read fails while loading, or worse: codes are taken for
numbers. So all that is not listed here is refused before anything is loaded.

The table of `docs/supported_models.md` is made of `SERVED`. MLX is not imported.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_metal.errors import UserError

ANY = "every model without quantised experts"

_DEEPSEEK = ("deepseek_v3", "joyai_llm_flash", "kimi_k2", "kimi_k25")
_GROUP_SIZES = (32, 64, 128)
"""Numbers of a row that share a scale, as MLX's kernels take them."""


@dataclass(frozen=True)
class Format:
    """A format of weights that is served."""

    model_types: tuple[str, ...] | str
    """As `config.json` has them; `ANY`."""
    memory: str
    """How the weights lie in memory."""
    note: str = ""


SERVED: dict[str, Format] = {
    "awq": Format(ANY, "packed, 4 bits", "4 bits in groups of 32, 64 or 128, layout `gemm`"),
    "bitnet": Format(ANY, "packed, 2 bits", "on Metal alone"),
    "fp8": Format(
        (*_DEEPSEEK, "deepseek_v32", "glm_moe_dsa", "mimo_v2_flash", "minimax", "minimax_m2")
        + ("mistral4",),
        "converted, 16 or 32 bits",
        "scales for blocks of 128 x 128; for `mistral4` also one for each tensor",
    ),
    "mxfp4": Format(("gpt_oss",), "packed, 4 bits"),
    "mxfp8": Format(("minimax_m3_vl",), "packed, 8 bits"),
    "compressed-tensors pack-quantized": Format(
        (*_DEEPSEEK, "mistral4"), "packed, 4 bits", "4 bits, symmetric; not `kv_b_proj`"
    ),
    "compressed-tensors mxfp4-pack-quantized": Format(("kimi_k3",), "packed, 4 bits", "experts"),
    "modelopt NVFP4": Format(
        ("muse_spark",),
        "packed, 4 bits",
        "experts; weights are compared and not logits, since mlx-lm's model needs Metal",
    ),
}
"""What is served besides MLX's own format, by `quant_method` and, where it has several, format."""

REMEDY = "take a checkpoint in MLX's format (mlx_lm.convert writes one)"


def settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The foreign quantisation of a `config.json`; None for MLX's own or none at all."""
    if config.get("quantization"):
        return None
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or text.get("quantization_config")
    return found if found and format_name(found) else None


def format_name(quantization: Mapping[str, Any]) -> str:
    """The format's name, as in `SERVED`; empty where the settings name none."""
    method = str(quantization.get("quant_method") or "").lower().replace("_", "-")
    nested = quantization.get("quantization") or quantization
    if method.startswith("modelopt") or "quant_algo" in nested:
        return f"modelopt {nested.get('quant_algo')}"
    if method == "compressed-tensors":
        return f"{method} {quantization.get('format')}"
    return method


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why the weights of a `config.json` are not served; None if they are."""
    quantization = settings(config)
    if quantization is None:
        return None
    name, model_type = format_name(quantization), _model_type(config)
    known = SERVED.get(name)
    if known is None:
        served = ", ".join(["MLX's own", *SERVED])
        return f"weights in the format {name} are not served (served: {served}); {REMEDY}"
    if known.model_types != ANY and model_type not in known.model_types:
        return (
            f"weights in the format {name} are not served for {model_type} "
            f"(served: {', '.join(known.model_types)}); {REMEDY}"
        )
    reasons = list(_unread_settings(name, quantization, model_type))
    if reasons:
        return f"weights in the format {name}: {'; '.join(reasons)}; {REMEDY}"
    return None


def check(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses a checkpoint whose weights mlx-lm cannot read, or would misread.

    Raises:
        UserError: naming the format and what is served.
    """
    reason = refusal(config)
    quantization = settings(config)
    if reason is None and quantization is not None:
        name = format_name(quantization)
        found = "; ".join(_unread_tensors(name, tensor_types(folder)))
        reason = found and f"weights in the format {name}: {found}; {REMEDY}"
    if reason:
        raise UserError("The checkpoint cannot be served", [reason])


def tensor_types(folder: Path) -> dict[str, str]:
    """Every tensor's type, such as `F32` or `F8_E4M3`, from the heads of the weight files."""
    types: dict[str, str] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            [length] = struct.unpack("<Q", stream.read(8))
            head = json.loads(stream.read(length))
        types |= {name: tensor["dtype"] for name, tensor in head.items() if name != "__metadata__"}
    return types


def _model_type(config: Mapping[str, Any]) -> str:
    """The type whose code reads the weights: within `mistral3`, that of the language model."""
    model_type = config.get("model_type", "")
    if model_type == "mistral3":
        return (config.get("text_config") or {}).get("model_type", model_type)
    return model_type


def _unread_settings(name: str, quantization: Mapping[str, Any], model_type: str) -> Iterator[str]:
    """Settings that mlx-lm does not read, each with what is served."""
    if name == "awq":
        bits, group_size = quantization.get("bits", 4), quantization.get("group_size", 128)
        if bits != 4:
            yield f"bits is {bits} (served: 4)"
        if group_size not in _GROUP_SIZES:
            yield f"group_size is {group_size} (served: {_listed(_GROUP_SIZES)})"
        if (version := str(quantization.get("version", "gemm")).lower()) != "gemm":
            yield f"version is {version} (served: gemm)"
    elif name == "fp8":
        block = quantization.get("weight_block_size")
        whole = block is None and model_type == "mistral4"
        if list(block or ()) != [128, 128] and not whole:
            yield f"weight_block_size is {block} (served: [128, 128])"
    elif name == "compressed-tensors pack-quantized":
        for group in (quantization.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            for key, served in (
                ("num_bits", (4,)),
                ("type", ("int",)),
                ("symmetric", (True,)),
                ("group_size", _GROUP_SIZES),
            ):
                if weights.get(key) not in served:
                    yield f"{key} is {weights.get(key)} (served: {_listed(served)})"


def _unread_tensors(name: str, types: Mapping[str, str]) -> Iterator[str]:
    """Tensors that mlx-lm misreads in files of a format."""
    if name == "awq" and (found := [n for n in types if ".experts." in n and "qweight" in n]):
        yield f"the experts are quantised ({found[0]}), which is not served"
    if name == "fp8":
        scales = {t for n, t in types.items() if n.endswith("_scale_inv")}
        if wrong := scales - {"F32", "F16", "BF16"}:
            yield f"scales have the type {_listed(sorted(wrong))} (served: F32, F16, BF16)"
    if name == "compressed-tensors pack-quantized":
        if found := [n for n in types if n.endswith("kv_b_proj.weight_packed")]:
            yield f"{found[0]} would be quantised a second time, which is not served"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
