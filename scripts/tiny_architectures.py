"""A tiny random model of every architecture that mlx-lm knows.

`tiny_architectures.json` has one configuration for each model file of mlx-lm: small sizes, every
kind of layer the architecture has, windows that a short prompt crosses. Its variants are further
configurations of some architectures, as tests need them. A configuration is a `config.json` in
which "+" names fragments of common fields that it begins with.
"""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map
from mlx_lm.models import bitlinear_layers
from mlx_lm.utils import _get_classes

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text())

ARCHITECTURES: tuple[str, ...] = tuple(_DATA["architectures"])
"""Names of mlx-lm's model files."""

HELPERS = frozenset(
    "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm "
    "switch_layers".split()
)
"""Files beside them that hold no model."""

STAND_INS = {
    "bitnet": "checked with plain MLX operations in place of mlx-lm's Metal kernel for ternary "
    "weights",
    "olmo": "checked without the package `hf_olmo`, whose presence mlx-lm asks for and whose code "
    "it does not use",
}
"""What `tiny_model` replaces where it cannot run, by architecture."""


def model_files() -> set[str]:
    """Names of the model files of the mlx-lm that is installed."""
    folder = Path(mlx_lm.models.__file__).parent
    return {file.stem for file in folder.glob("*.py")} - HELPERS - {"__init__"}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a tiny model of the architecture or variant, with changed fields."""
    config = _expand((_DATA["architectures"] | _DATA["variants"])[name])
    return {"model_type": name, "torch_dtype": "float32", **config} | changes


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """mlx-lm's model of the architecture or variant, with changed fields of its `config.json`.

    Its weights are float32, random and large enough for every layer to matter.
    """
    mx.random.seed(seed)
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    if not mx.metal.is_available():
        bitlinear_layers.BitLinear.execute_matmul_kernel = _ternary_product  # type: ignore[method-assign]
    config = config_of(name, **changes)
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    keys = _keys(seed)
    model.update(tree_map(lambda array: _random(array, next(keys)), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _expand(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    expanded: dict[str, Any] = {}
    for fragment in config.get("+", ()):
        expanded |= _DATA["fragments"][fragment]
    return expanded | {key: _expand(value) for key, value in config.items() if key != "+"}


def _keys(seed: int) -> Iterator[mx.array]:
    key = mx.random.key(seed)
    while True:
        key, sub = mx.random.split(key)
        yield sub


def _random(array: mx.array, key: mx.array) -> mx.array:
    """Weights that keep the size of activations; vectors stay near what the model began with."""
    if not mx.issubdtype(array.dtype, mx.floating):  # packed weights
        octets = mx.random.randint(0, 256, (*array.shape, array.dtype.size), key=key)
        return octets.astype(mx.uint8).view(array.dtype).reshape(array.shape)
    noise = mx.random.normal(array.shape, key=key)
    if array.ndim < 2:
        return (array + 0.1 * noise).astype(mx.float32)
    return noise * array.shape[-1] ** -0.5


def _ternary_product(self: nn.Module, x: mx.array, packed: mx.array) -> mx.array:
    """x [..., in] times two-bit weights [out / 4, in] that stand for -1, 0, 1, 2; [..., out]."""
    shifts = mx.array([0, 2, 4, 6], mx.uint8)[:, None, None]
    weights = (((packed >> shifts) & 3).astype(x.dtype) - 1).reshape(-1, packed.shape[-1])
    return (x @ weights[: self.out_features].T) * self.weight_scale
