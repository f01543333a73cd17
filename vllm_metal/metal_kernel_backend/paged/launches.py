"""Launches of the kernels of one layout: what all of them are compiled for and are told."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import (
    SIMD_SIZE,
    Kernel,
    Run,
    Target,
    Template,
)


class Launches:
    """Kernels on one target, each built at its first launch.

    Args:
        target: that runs them.
        template: what all of them are compiled for.
        known: inputs by name, of which each takes those that it has.
    """

    def __init__(self, target: Target, template: Template, known: Mapping[str, mx.array]):
        self._target, self._template, self._known = target, template, known
        self._built: dict[tuple[str, int], Run] = {}

    def launch(
        self,
        kernel: Kernel,
        constants: Mapping[str, mx.array],
        inputs: Mapping[str, mx.array],
        template: Mapping[str, int],
        simdgroups: int,
        threadgroups: tuple[int, int, int],
        outputs: Mapping[str, tuple[tuple[int, ...], Any]],
        resident: int = 0,
    ) -> list[mx.array]:
        """Runs a kernel.

        Args:
            constants: further inputs of which it takes those that it has.
            inputs: that it must have.
            template: what it is compiled for, beside the layout.
            simdgroups: of a threadgroup.
            threadgroups: on each axis of the grid.
            outputs: shape and type of each.
            resident: threadgroups that a core is to hold at a time; 0: the target's choice.

        Raises ValueError, with the names, where an input is missing or superfluous.
        """
        threads = simdgroups * SIMD_SIZE
        key = kernel.name, resident
        if key not in self._built:
            bounds = (threads, resident) if resident else None
            self._built[key] = self._target.build(kernel, bounds)
        shapes, dtypes = zip(*(outputs[name] for name in kernel.output_names), strict=True)
        known = {**self._known, **constants}
        taken = {name: known[name] for name in kernel.input_names if name in known}
        return self._built[key](
            inputs=kernel.in_order({**taken, **inputs}),
            template=[*self._template, *template.items(), ("SIMDGROUPS", simdgroups)],
            grid=(threadgroups[0] * threads, *threadgroups[1:]),
            threadgroup=(threads, 1, 1),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )
