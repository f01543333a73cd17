"""Applies the language-model head to sampled rows only, for any mlx-lm model.

The head is the largest matrix of many models, and a prefill chunk samples at most its last row.
The module that feeds the head is found by shape, not by name.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from vllm_metal.errors import ChangedLibraryError

DryRun = Callable[[], mx.array]
"""One lazy forward of a few tokens, [1, L, vocabulary]."""


class HeadRows:
    """A model whose head can be spared all rows but the last.

    The module that feeds the head is, from the top down, the largest child whose output is not yet
    logits.

    Args:
        model: the model; the module found gets a class of its own.
        dry_run: runs the model.
    """

    def __init__(self, model: nn.Module, dry_run: DryRun):
        feeding = _module_that_feeds_the_head(model, dry_run)
        self.spares_head = feeding is not None
        """False where there is no such module: the head then runs on every row."""
        self._last_only = False
        self._kept: list[mx.array] | None = None
        self._given: mx.array | None = None
        if feeding is not None:
            _replace_call(feeding, self._cut, instead=lambda: self._given)

    @contextmanager
    def last_only(self, wanted: bool = True) -> Iterator[None]:
        """Within the block, if so wanted, the head gets the last row of its input only."""
        self._last_only = wanted
        try:
            yield
        finally:
            self._last_only = False

    def input_of_head(self, run: Callable[[], mx.array]) -> mx.array:
        """What the lazy forward pass `run` gives to the head, every row: [B, L, hidden].

        Only where the model `spares_head`. The logits of the pass are never computed.
        """
        kept: list[mx.array] = []
        self._kept = kept
        try:
            with self.last_only():
                run()
        finally:
            self._kept = None
        [hidden] = kept
        return hidden

    def head(self, hidden: mx.array, run: Callable[[], mx.array]) -> mx.array:
        """Logits of `hidden` [B, R, hidden], lazily. `run` passes through the head alone."""
        self._given = hidden
        try:
            return run()
        finally:
            self._given = None

    def _cut(self, hidden: mx.array) -> mx.array:
        if self._kept is not None:
            self._kept.append(hidden)
        return hidden[:, -1:] if self._last_only else hidden


def _module_that_feeds_the_head(model: nn.Module, dry_run: DryRun) -> nn.Module | None:
    outputs: dict[int, tuple[int, ...]] = {}
    modules = [model, *_largest_descendants(model)]
    with _ObservedCalls(modules, outputs):
        logits = dry_run()
    for module in modules[1:]:
        shape = outputs.get(id(module))
        if shape is None or shape[:2] != logits.shape[:2]:
            return None
        if shape[-1] != logits.shape[-1]:
            return module
    return None


def _largest_descendants(module: nn.Module) -> list[nn.Module]:
    """The chain of largest composite child modules, from the top down to the list of layers."""
    chain: list[nn.Module] = []
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
    return tree_reduce(lambda total, array: total + array.size, module.parameters(), 0)


def _replace_call(
    module: nn.Module,
    after: Callable[[Any], Any],
    instead: Callable[[], Any] = lambda: None,
) -> None:
    """Gives this one instance a class whose `__call__` passes its result through `after`.

    Where `instead` gives anything but None, the module does not run and that is its result.
    """
    original = type(module)

    @functools.wraps(original.__call__)
    def call(self, *args, **kwargs):
        if (given := instead()) is not None:
            return given
        return after(original.__call__(self, *args, **kwargs))

    # patch: the class of one module of the model
    try:
        module.__class__ = type(original.__name__, (original,), {"__call__": call})
    except TypeError as error:
        name = f"{original.__module__}.{original.__name__}.__class__"
        raise ChangedLibraryError("mlx", name, str(error)) from error


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
