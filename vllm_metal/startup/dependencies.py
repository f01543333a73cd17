"""What the results of a server's start depend on, in a form that can be written as JSON.

Whatever changes a result must change its dependencies, or a server would start with a result of
another. Whatever is named here without need costs one measurement when it changes.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm_metal
from vllm_metal.machine.blas import load_fast_blas
from vllm_metal.machine.device import Device
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEMA = 1
"""Raised when the files of `result_cache.py` change their form."""

PACKAGES = ("mlx", "mlx-lm", "numpy")


def of_server(
    model_folder: Path, settings: Mapping[str, Any], dtype: object, device: Device
) -> dict[str, Any]:
    """What every result depends on.

    Args:
        model_folder: holds the weights, and any code of the model's own.
        settings: those of config.json, which may be elsewhere and changed by overrides.
        dtype: in which the model computes.
        device: on which it runs.
    """
    return {
        "schema": SCHEMA,
        "model": _model_files(model_folder),
        "settings": _digest(json.dumps(settings, sort_keys=True, default=str).encode()),
        "dtype": str(dtype),
        "device": _device(device),
        "packages": {name: version(name) for name in PACKAGES},
        "vllm_metal": [vllm_metal.__version__, sources_digest(Path(vllm_metal.__file__).parent)],
    }


def of_key_constants(
    beginning: Sequence[int], token_ids: Sequence[int], max_model_len: int
) -> dict[str, Any]:
    """What the key constants depend on besides: the tokens before every prompt, the calibration
    text as the tokenizer splits it, and the positions that it is spread over."""
    digest = _digest(",".join(map(str, token_ids)).encode())
    return {"beginning": list(beginning), "token_ids": digest, "max_model_len": max_model_len}


def of_compression_loss(
    turboquant: TurboQuantConfig, num_layers: int, dense_dtype: str
) -> dict[str, Any]:
    """What the loss of the formats depends on besides the key constants: the formats, the layers
    that stay dense, and the type of their pages and of those that it is compared with."""
    return {
        "formats": str(turboquant.formats),
        "dense_layers": sorted(turboquant.skipped(num_layers)),
        "dense_dtype": dense_dtype,
    }


def of_forward_peaks(vllm_config: "VllmConfig") -> dict[str, Any]:
    """What the peaks of forward passes depend on besides: the pages, and the largest steps."""
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    return {
        "additional_config": vllm_config.additional_config,
        "kv_cache_dtype": cache.cache_dtype,
        "block_size": cache.block_size,
        "mamba_cache_mode": cache.mamba_cache_mode,
        "prefix_match_unit": cache.prefix_match_unit,
        "max_model_len": vllm_config.model_config.max_model_len,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        "max_num_seqs": scheduler.max_num_seqs,
        "num_speculative_tokens": vllm_config.num_speculative_tokens,
    }


def of_decode_answers(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the answers of `decode_probe` depend on besides: the prompts, as tokens."""
    return {"prompts": [list(prompt) for prompt in prompts]}


def _model_files(folder: Path) -> dict[str, Any]:
    """The weights' bytes are not read: a file whose size and time are unchanged is unchanged.

    In the Hugging Face hub's folder the path names the revision and the files are links, which are
    followed.
    """
    files = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "folder": str(folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()},
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _device(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": device.kind,
        "name": device.name,
        "memory_limit": device.memory_limit,
        "system": platform.platform(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MLX_")},
    }
    if device.kind == "cpu":
        found["blas"] = load_fast_blas()
        found["fuses_operations"] = shutil.which("g++") is not None  # MLX compiles them with it
    return found


@cache
def sources_digest(package: Path) -> str:
    """Of the package's Python files, so that a change of the code between versions counts.

    The kernels' text is no Python file: it changes how fast keys are read, and neither what a
    calibration gives nor, being one operation to MLX, what memory a step takes.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
