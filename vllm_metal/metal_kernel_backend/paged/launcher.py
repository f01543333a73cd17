"""Launchers of the kernels over pages: grids, templates, shapes.

Letters: T new tokens, B requests, Q query tokens of a request, Hq query heads, H KV heads,
G = Hq / H, N blocks of a request, D head size.

The order of a write and the reads after it: `store` writes through its input `pages` and returns
a token, a small array. Every reader takes the token and binds it, so that the GPU runs the reader
after the writer. That a block is written again only after it was read is up to the caller: in the
server, `vllm_metal/runner/steps_in_flight.py` says how.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Generic, Protocol, TypeVar

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import Target, Template
from vllm_metal.metal_kernel_backend.paged import parameters
from vllm_metal.metal_kernel_backend.paged.constants_header import BLOCK_SIZE_STEP, TOKEN_WORDS
from vllm_metal.metal_kernel_backend.paged.kernels import AFTER, LayerConstants, PageKernels
from vllm_metal.metal_kernel_backend.paged.launches import Launches
from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW, lengthened
from vllm_metal.metal_kernel_backend.paged.splits import (
    DECODE_SIMDGROUPS,
    FORM_OF_TARGET,
    Gpu,
    MatrixForm,
    plan_decode,
)

MERGE_SIMDGROUPS = 8
STORE_SIMDGROUPS = 4
MAX_QUERY_TOKENS = 8

MAX_HELD = 2048
"""Elements of output that a simdgroup holds at most: rows times head size."""


class Layout(Protocol):
    """What a launcher asks a page layout for."""

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def key_head_size(self) -> int: ...

    @property
    def value_head_size(self) -> int: ...

    @property
    def lane_elements(self) -> int:
        """Elements of a key or value that a lane of the decode kernel holds."""

    def template(self) -> Template:
        """What the kernels are compiled for."""


PagesOf = TypeVar("PagesOf", bound=Layout)


@dataclass
class PageLauncher(Generic[PagesOf]):
    """The kernels of one layout on one target. Layers of equal layout may share it."""

    kernels: ClassVar[PageKernels]

    layout: PagesOf
    target: Target
    num_cores: int = 0
    """Cores of the GPU, for which requests are then split however short they are. This and the next
    two are `Gpu`'s; 0 takes what suits the target."""
    max_rows: int = 0
    run_tokens: int = 0
    matrix: MatrixForm | None = FORM_OF_TARGET
    """How decode multiplies matrices; None: it does not."""

    def __post_init__(self) -> None:
        layout = self.layout
        gpu = Gpu.of(self.target, layout.lane_elements)
        largest = max(layout.key_head_size, layout.value_head_size)
        self.gpu = replace(
            gpu,
            cores=self.num_cores or gpu.cores,
            max_rows=max(1, min(self.max_rows or gpu.max_rows, MAX_HELD // largest)),
            run_tokens=self.run_tokens or gpu.run_tokens,
            one_split_tokens=0 if self.num_cores else gpu.one_split_tokens,
        )
        if not self.kernels.matrix_decode:
            self.matrix = None
        elif self.matrix == FORM_OF_TARGET:
            self.matrix = MatrixForm.of(self.target, largest)
        self._launch = Launches(self.target, layout.template(), self.layout_inputs()).launch
        self._no_token = mx.array([0] * TOKEN_WORDS, mx.uint32)
        self._no_sinks = mx.array([0.0] * CONSTANT_BELOW)

    def layout_inputs(self) -> dict[str, mx.array]:
        """What the kernels are told of the layout in arrays, as inputs by name."""
        return {}

    def no_token(self) -> mx.array:
        """A token for pages to which nothing has been stored yet."""
        return self._no_token

    def store(
        self,
        pages: mx.array,  # as the layout has them
        keys: mx.array,  # [T, H, Dk] float16, bfloat16 or float32
        values: mx.array,  # [T, H, Dv], any of these types
        slot_mapping: mx.array,  # [T] int32, block * block_size + offset; below 0: skipped
        constants: LayerConstants,
        token: mx.array | None = None,
    ) -> mx.array:  # uint32 [TOKEN_WORDS], the token that readers take
        """Writes T tokens into the pages, in place, in one dispatch.

        `token` orders this store after an earlier one to the same pages.
        """
        tokens, heads, _ = keys.shape
        vectors = max(2 * tokens * heads, TOKEN_WORDS)  # each word is written by one of them
        return self._launch(
            self.kernels.store,
            constants.inputs(),
            {
                "pages": pages,
                "keys": keys,
                "values": values,
                "slot_mapping": lengthened(slot_mapping, filler=-1),
                "parameters": parameters.STORE.array(num_tokens=tokens),
                AFTER: self.no_token() if token is None else token,
            },
            {},
            STORE_SIMDGROUPS,
            (-(-vectors // STORE_SIMDGROUPS), 1, 1),
            {"token": ((TOKEN_WORDS,), mx.uint32)},
        )[0]

    def decode(
        self,
        pages: mx.array,  # as the layout has them
        queries: mx.array,  # [B, Q, Hq, Dk], Q in 1..8: the last Q tokens of each request
        block_table: mx.array,  # [B, N] int32
        seq_lens: mx.array,  # [B] int32, the Q tokens included; 0 gives zeros
        constants: LayerConstants,
        scale: float,
        max_seq_len: int,
        token: mx.array,  # uint32 [TOKEN_WORDS], from the last store
        sinks: mx.array | None = None,  # [Hq] float32: logits without a value
        window: int = 0,  # tokens that a query sees, itself included; 0: all
        softcap: float = 0.0,  # scores become softcap * tanh(score / softcap); 0: unchanged
    ) -> mx.array:  # [B, Q, Hq, Dv], as queries
        """Attention of Q query tokens per request over its pages, each seeing those before it.

        Raises ValueError if Q is over 8.
        """
        batch, num_queries, heads, _ = queries.shape
        if not 1 <= num_queries <= MAX_QUERY_TOKENS:
            raise ValueError(
                f"{num_queries} query tokens per request; 1 to {MAX_QUERY_TOKENS} are allowed"
            )
        num_kv_heads = self.layout.num_kv_heads
        heads_per_kv_head = heads // num_kv_heads
        visible = max_seq_len
        if window:  # a split begins at a multiple of a block's step
            visible = min(max_seq_len, window + num_queries + BLOCK_SIZE_STEP)
        rows, kv_heads = heads_per_kv_head * num_queries, batch * num_kv_heads
        plan = plan_decode(self.gpu, rows, kv_heads, visible, self.matrix)
        settings = parameters.DECODE.array(
            split_tokens=plan.split_tokens,
            num_splits=plan.num_splits,
            window=window,
            max_blocks=block_table.shape[1],
            scale=scale,
            softcap=softcap,
        )
        template = {
            "G": heads_per_kv_head,
            "Q": num_queries,
            "SINKS": int(sinks is not None),
        }
        shared = {
            "queries": queries,
            "seq_lens": lengthened(seq_lens, filler=0),
            "sinks": self._no_sinks if sinks is None else _float_sinks(sinks),
            "parameters": settings,
        }
        outputs = self._decode_outputs(queries, plan.num_splits)
        merged = outputs.pop("merged", None)
        kernel = self.kernels.matrix_decode if plan.matrix else self.kernels.decode
        assert kernel is not None, "these pages have no matrix form"
        partials, states, output = self._launch(
            kernel,
            constants.inputs(),
            {
                **shared,
                "pages": pages,
                "block_table": lengthened(block_table, filler=0),
                AFTER: token,
            },
            {
                **template,
                "R": plan.rows,
                "TOKENS": plan.matrix.tile_tokens if plan.matrix else self.gpu.run_tokens,
                "SOFTCAP": int(softcap > 0),
            },
            DECODE_SIMDGROUPS,
            (num_kv_heads * plan.tiles, plan.num_splits, batch),
            outputs,
            plan.resident,
        )
        if not merged:
            return output
        return self._launch(
            self.kernels.merge,
            constants.inputs(),
            {**shared, "partials": partials, "states": states},
            template,
            MERGE_SIMDGROUPS,
            (num_queries * heads, batch, 1),
            {"output": merged},
        )[0]

    def _decode_outputs(self, queries: mx.array, num_splits: int) -> dict[str, tuple]:
        """What decode writes, and what merge makes of it: with one split the output itself, so that
        there is nothing to merge. Outputs that nothing is written to have the least size."""
        batch, num_queries, heads, _ = queries.shape
        value_size = self.layout.value_head_size
        output = (batch, num_queries, heads, value_size), queries.dtype
        nothing = (CONSTANT_BELOW,)
        if num_splits == 1:
            return {
                "partials": (nothing, mx.float32),
                "states": (nothing, mx.float32),
                "output": output,
            }
        rows = batch, num_splits, num_queries * heads
        return {
            "partials": ((*rows, value_size), mx.float32),
            "states": ((max(2 * prod(rows), CONSTANT_BELOW),), mx.float32),
            "output": (nothing, queries.dtype),
            "merged": output,
        }

    def read(
        self,
        pages: mx.array,  # as the layout has them
        block_table: mx.array,  # [N] int32, one request
        constants: LayerConstants,
        first: int,  # even
        count: int,
        token: mx.array,  # uint32 [TOKEN_WORDS], from the last store
        dtype: mx.Dtype,
        heads: slice = slice(None),  # of the H KV heads, without a step
    ) -> tuple[mx.array, mx.array]:  # [heads, count, Dk], [heads, count, Dv]
        """Tokens first .. first + count - 1 of a request, as the model had them.

        Raises ValueError if `first` is odd.
        """
        if first % 2:
            raise ValueError(f"first token {first} is odd")
        layout = self.layout
        first_head, end_head, _ = heads.indices(layout.num_kv_heads)
        rows = end_head - first_head, count
        pairs = 2 * -(-count // 2)  # of keys and of values, each a simdgroup's
        keys, values = self._launch(
            self.kernels.read,
            constants.inputs(),
            {
                "pages": pages,
                "block_table": lengthened(block_table, filler=0),
                "parameters": parameters.READ.array(
                    first_token=first, num_tokens=count, first_head=first_head
                ),
                AFTER: token,
            },
            {},
            STORE_SIMDGROUPS,
            (-(-pairs // STORE_SIMDGROUPS), rows[0], 1),
            {
                "keys": ((*rows, layout.key_head_size), dtype),
                "values": ((*rows, layout.value_head_size), dtype),
            },
        )
        return keys, values


def _float_sinks(sinks: mx.array) -> mx.array:
    return lengthened(sinks.astype(mx.float32), filler=0)
