"""Times the attention layers of a decode step as the server runs them.

A step stores one new token of each request in every layer and attends from it, layer after layer:
the output of one is the query of the next, as in a model. MLX is given the whole step at once, as
in the server, and what lies between the layers of a model is left out. Dense pages run the same
step through the same interface, on the kernels where they serve.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_metal.attention.backend import AttentionBackend, Pages, Rows
from vllm_metal.kv_cache.group_metadata import decode_rows, prefill_chunk
from vllm_metal.kv_cache.groups import AttentionGroup

LAYERS = 28
SHAPES = ((1, 1024), (1, 8192), (1, 32768), (8, 4096))
"""Requests, and tokens of each."""
REPEATS, WARM_UP = 7, 2
MEMORY_SHARE = 4
"""A shape is left out where its pages would take more than 1 / MEMORY_SHARE of the memory."""

_STORED_AT_ONCE = 2048
_COPIED_BYTES = 256 << 20


@dataclass(frozen=True)
class StepTime:
    """One kind of page in one shape."""

    pages: str
    """The format pair, or `dense`."""
    requests: int
    context: int
    """Tokens of each request."""
    milliseconds: float
    """Median wall-clock time of one evaluation of `LAYERS` layers."""
    bytes_read: int
    """Bytes of keys and values that the step must read from the pages."""

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes that the step must read, by the time it takes."""
        return self.bytes_read / self.milliseconds / 1e6


class DecodeStep:
    """The attention layers of one decode step, over pages that are filled.

    Args:
        backend: used for every layer; they have pages of their own. Keys and values of one size.
        requests: how many requests are decoded.
        context: tokens of each, the new one included.
        layers: number of layers.
        heads: query heads, a multiple of the backend's KV heads.
        dtype: of queries, keys and values.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        requests: int,
        context: int,
        layers: int = LAYERS,
        heads: int = 32,
        dtype: mx.Dtype = mx.float16,
    ):
        self._backend = backend
        self._key = mx.random.key(0)
        shape, blocks = backend.shape, -(-context // backend.block_size)
        group = AttentionGroup(backend.block_size, layers=(0,))
        order = 1 + np.random.default_rng(0).permutation(requests * blocks).astype(np.int32)
        tables = order.reshape(requests, blocks)
        page = backend.page_size_bytes // backend.page_dtype.size
        array = mx.zeros((requests * blocks + 1, page), backend.page_dtype)
        pages = Pages(array, backend.first_token())
        for table in tables:
            for start in range(0, context - 1, _STORED_AT_ONCE):
                count = min(_STORED_AT_ONCE, context - 1 - start)
                chunk = prefill_chunk(group, table, start, count)
                keys, values = (self._normal(dtype, count, shape.num_kv_heads) for _ in range(2))
                pages = backend.store(pages, keys, values, chunk)
                mx.eval(*_arrays(pages))
        self.pages = [pages]
        self.pages += [Pages(pages.array + 0, pages.token) for _ in range(layers - 1)]
        positions = np.full(requests, context - 1, np.int32)
        self._metadata = decode_rows(group, tables, positions)
        self._queries = self._normal(dtype, requests, heads)
        del array, pages  # each layer's array has one holder, or a store would copy it
        mx.eval(self._queries, *map(_arrays, self.pages))
        self.bytes_read = layers * requests * context * shape.num_kv_heads * backend.slot_size

    def build(self, evaluate: Callable[..., None] = lambda *_: None) -> mx.array:
        """The output [B, Hq, D] of the last layer; `pages` become those after the step.

        All is lazy, unless `evaluate` is given: it is called with the arrays of each layer.
        """
        heads, scale = self._backend.shape.num_kv_heads, self._backend.shape.head_size**-0.5
        x = self._queries
        for layer, pages in enumerate(self.pages):
            new = x[:, :heads]
            self.pages[layer] = pages = self._backend.store(pages, new, new, self._metadata)
            evaluate(*_arrays(pages))
            x = self._backend.decode(pages, Rows(x, self._metadata, scale))
            evaluate(x)
        return x

    def evaluated(self) -> mx.array:
        """The same, computed in one evaluation with all pages."""
        output = self.build()
        mx.eval(output, *map(_arrays, self.pages))
        return output

    def milliseconds(self) -> float:
        """Median time of an evaluation; the graph is built before, as in the server."""

        def run() -> float:
            output = self.build()
            mx.synchronize()
            start = time.perf_counter()
            mx.eval(output, *map(_arrays, self.pages))
            mx.synchronize()
            return 1e3 * (time.perf_counter() - start)

        return _median(run)

    def _normal(self, dtype: mx.Dtype, rows: int, heads: int) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return mx.random.normal((rows, heads, self._backend.shape.head_size), key=key).astype(dtype)


def time_steps(
    backends: Sequence[tuple[str, AttentionBackend]],
    memory_limit: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    layers: int = LAYERS,
) -> Iterator[StepTime]:
    """The time of a step for every shape that fits, and in each for every kind of page.

    Args:
        backends: names and backends, with 4 query heads for each KV head.
        memory_limit: bytes of the device.
        shapes: requests, and tokens of each.
        layers: number of layers.
    """
    for requests, context in shapes:
        tokens = requests * context
        largest = max(layers * tokens * _token_bytes(backend) for _, backend in backends)
        if largest > memory_limit // MEMORY_SHARE:
            continue
        for name, backend in backends:
            heads = 4 * backend.shape.num_kv_heads
            step = DecodeStep(backend, requests, context, layers, heads)
            yield StepTime(name, requests, context, step.milliseconds(), step.bytes_read)
            del step
            mx.clear_cache()


def copy_gigabytes_per_second() -> float:
    """What a plain copy on the device moves, bytes read and bytes written together."""
    source = mx.zeros((_COPIED_BYTES // 4,), mx.uint32)
    mx.eval(source)

    def run() -> float:
        copy = source + 1
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(copy)
        mx.synchronize()
        return time.perf_counter() - start

    return 2 * _COPIED_BYTES / _median(run) / 1e9


def _arrays(pages: Pages) -> list[mx.array]:
    return [array for array in pages if array is not None]


def _token_bytes(backend: AttentionBackend) -> int:
    return backend.shape.num_kv_heads * backend.slot_size


def _median(run: Callable[[], float]) -> float:
    return statistics.median([run() for _ in range(WARM_UP + REPEATS)][WARM_UP:])
