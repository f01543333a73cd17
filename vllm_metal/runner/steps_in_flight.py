"""The steps that are dispatched and whose tokens the host does not know yet: two at most.

vLLM's asynchronous scheduling asks for step n + 1 once it has the tokens of step n - 1, while
step n runs. Where MLX writes pages, step n + 1 is built then, and dispatched when step n has ended.
Where kernels write all pages (`KVCache.stores_through`), it is dispatched at once, so that the GPU
goes on with it without waiting for the host. MLX sees kernels read pages and never sees them write
(`launcher`), so what keeps these reads and writes in order is written down here.

**Between two decode steps it is the tokens.** A step that is dispatched while another runs
consists of decodes of requests that were in that step (`ModelRunner._can_run_ahead`).

1. All that it writes depends on the tokens of the step before: its token ids are that array of
   tokens, lazily (`forward_inputs`); keys and values are computed from token ids; and `store` binds
   keys and values.
2. This array depends on all that the step before has read and written. It is one argmax over the
   logits of all rows; the logits depend on the `decode` of each layer; and `decode` binds the token
   that the layer's `store` returns.

So each write comes after every read and every write of the step before, and each read, which
binds the token of its own step's store, comes after them too. It makes no difference whether a
block has changed hands in between: because its request has finished or was preempted, because it
slid out of a window, or because a result came so late that a finished request is computed once
more.

**All else waits for the host** (`StepsInFlight.finish`), since it does not depend on these tokens:
a step that a request joins or rejoins, prompt chunks, copies of blocks, blocks on their way to or
from disk (`kv_store/transfers.py`), several forward passes in one step, and steps that vLLM's
sampler samples. A prefix cache that is reset writes nothing;
whoever is given its blocks joins.

**On the GPU, "depends" means "runs after".** MLX evaluates the operations of a stream in an order
that respects dependence, and the GPU keeps this order along each chain of operations of which each
binds an array that the one before returns (MLX 0.32):

- Metal (`CommandEncoder` in mlx/backend/metal/device.cpp): the dispatches of an encoder may run
  concurrently, but one that binds what was written since the last barrier is preceded by a barrier,
  and an encoder that binds what an unfinished encoder wrote waits for a fence that this encoder
  updates at its end. Both order more than the array they are for: a barrier orders all buffers and
  all dispatches before it, a fence the whole encoder. Pages come under both.
- CUDA (mlx/backend/cuda/device.cpp): operations are nodes of a graph, with an edge to each node
  from those that wrote what it binds; graphs run one after the other in one CUDA stream.

**Memory.** An evaluated array lets go of the operations that made it, so what a dispatched step
holds is the memory of its operations until they have run. With two steps that is at most twice what
one takes, which the memory plan includes (`StepMemory.decodes_at_once`). It is usually less: MLX
stops encoding while more than ten command buffers are unfinished.
"""

from collections import deque

from vllm_metal.runner.pending_tokens import PendingTokens
from vllm_metal.runner.request_batch import RequestBatch

MAX_STEPS = 2
"""One that runs, and one that is dispatched behind it."""


class StepsInFlight:
    """Greedy steps whose placeholders in the batch stand for tokens that MLX still computes.

    Args:
        batch: gets the tokens in place of its placeholders.
    """

    def __init__(self, batch: RequestBatch):
        self._batch = batch
        self._steps: deque[PendingTokens] = deque()

    @property
    def newest(self) -> PendingTokens | None:
        """The step that was dispatched last; None where nothing is in flight."""
        return self._steps[-1] if self._steps else None

    def add(self, step: PendingTokens) -> None:
        """Takes a step that has been dispatched. Raises RuntimeError if it is one too many."""
        if len(self._steps) == MAX_STEPS:
            raise RuntimeError(f"a step was dispatched while {MAX_STEPS} others were in flight")
        self._steps.append(step)

    def finish(self, but: int = 0) -> None:
        """Waits for all steps but the newest `but`, and puts their tokens into the batch."""
        while len(self._steps) > but:
            step = self._steps.popleft()
            for (req_id, position), token_id in zip(
                step.positions.items(), step.wait(), strict=True
            ):
                self._batch.fill_placeholder(req_id, position, token_id)
