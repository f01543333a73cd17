"""Applies the language-model head to sampled rows only, for any mlx-lm model.

The head is the largest matrix of many models, and a prefill chunk samples at most its last row.
The module that feeds the head is found by shape, not by name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

DryRun = Callable[[], mx.array]
"""One lazy forward of a few tokens, [1, L, vocabulary]."""


def slice_rows_before_head(
    model: nn.Module, dry_run: DryRun, last_row_only: Callable[[], bool]
) -> bool:
    """Makes the module that feeds the head return only its last row while asked to.

    Descending from the top, that module is the largest child whose output is not yet logits.

    Args:
        model: the model; the module found gets a class of its own.
        dry_run: runs the model.
        last_row_only: asked in every forward.

    Returns:
        False where there is no such module; logits are then sliced after the head.
    """
    outputs: dict[int, tuple[int, ...]] = {}
    modules = [model, *_largest_descendants(model)]
    with _ObservedCalls(modules, outputs):
        logits = dry_run()
    for module in modules[1:]:
        shape = outputs.get(id(module))
        if shape is None or shape[:2] != logits.shape[:2]:
            return False
        if shape[-1] != logits.shape[-1]:
            _replace_call(module, lambda out: out[:, -1:] if last_row_only() else out)
            return True
    return False


def _largest_descendants(module: nn.Module) -> list[nn.Module]:
    """The chain of largest composite child modules, from the top down to the list of layers."""
    chain = []
    while True:
        children = [
            child
            for child in module.children().values()
            if isinstance(child, nn.Module) and child.children()
        ]
        if not children:
            return chain
        module = max(children, key=_num_parameters)
        chain.append(module)


def _num_parameters(module: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def _replace_call(module: nn.Module, after: Callable[[Any], Any]) -> None:
    """Gives this one instance a class whose `__call__` passes its result through `after`."""
    original = type(module)

    @functools.wraps(original.__call__)
    def call(self, *args, **kwargs):
        return after(original.__call__(self, *args, **kwargs))

    module.__class__ = type(original.__name__, (original,), {"__call__": call})


class _ObservedCalls:
    """Within the block, notes the output shape of each module's last call under its id."""

    def __init__(self, modules: Sequence[nn.Module], outputs: dict[int, tuple[int, ...]]):
        self._modules, self._outputs = modules, outputs

    def __enter__(self) -> None:
        self._classes = [type(module) for module in self._modules]
        for module in self._modules:
            _replace_call(module, functools.partial(self._note, id(module)))

    def _note(self, key: int, out: Any) -> Any:
        if isinstance(out, mx.array):
            self._outputs[key] = tuple(out.shape)
        return out

    def __exit__(self, *_: Any) -> None:
        for module, original in zip(self._modules, self._classes, strict=True):
            module.__class__ = original
