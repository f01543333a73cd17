"""Starts the evaluation of a step and returns while it runs.

On a GPU that is `mx.async_eval`. On the CPU `mx.async_eval` returns only when all but the last few
operations are done (MLX bounds the tasks in flight), so a thread of its own evaluates there, and
the thread that schedules builds the next step meanwhile.

Steps are evaluated one after the other, in the order in which they are dispatched. Where MLX writes
pages, a step may not even be encoded for the GPU before the one before has ended: MLX would find
the arrays of pages held by it, and copy them. Where kernels write all pages, that does not matter.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

Wait = Callable[[], None]
"""Returns once the evaluation is done; raises what it raised."""

Dispatch = Callable[..., Wait]
"""Takes arrays, or lists of arrays, to evaluate."""


def make_dispatch(kernels_write_pages: bool = False) -> Dispatch:
    """Returns the dispatch for this process's default device.

    On the CPU it gives the calling thread a default stream that other threads may evaluate, too:
    graphs built before must be evaluated before.

    Args:
        kernels_write_pages: `KVCache.stores_through`. On a GPU, a step is then dispatched while the
            one before runs.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return _dispatch_to_gpu if kernels_write_pages else _dispatch_to_idle_gpu
    stream = mx.new_thread_unsafe_stream(mx.cpu)
    mx.set_default_stream(stream)
    thread = ThreadPoolExecutor(
        1, "mlx-eval", initializer=mx.set_default_stream, initargs=(stream,)
    )

    def dispatch(*arrays) -> Wait:
        return thread.submit(mx.eval, *arrays).result

    return dispatch


def _dispatch_to_gpu(*arrays) -> Wait:
    mx.async_eval(*arrays)
    return lambda: None  # whoever reads a result waits for it


def _dispatch_to_idle_gpu(*arrays) -> Wait:
    mx.synchronize()  # the step before is done, but its buffers may be held a moment longer
    return _dispatch_to_gpu(*arrays)
