"""The result of a step that MLX is still computing."""

from threading import Lock

import mlx.core as mx
import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_metal.runner.dispatch import Wait


class PendingTokens(AsyncModelRunnerOutput):
    """Tokens of a greedy step that MLX is still computing."""

    def __init__(
        self,
        tokens: mx.array,  # [R] int32, being computed
        wait_until_computed: Wait,
        positions: dict[str, int],
        output: ModelRunnerOutput,
    ):
        self.tokens = tokens
        self._wait_until_computed = wait_until_computed
        self.positions = positions
        """Request -> position of its token in the request; in the order of `tokens`."""
        self.index = {req_id: i for i, req_id in enumerate(positions)}
        self._output = output
        self._lock = Lock()
        self._token_ids: list[int] | None = None

    def wait(self) -> list[int]:
        """Waits until the step is computed; its tokens, in the order of `positions`.

        vLLM may ask from another thread than the runner's.
        """
        with self._lock:
            if self._token_ids is None:
                self._wait_until_computed()
                self._token_ids = np.array(self.tokens).tolist()
            return self._token_ids

    def get_output(self) -> ModelRunnerOutput:
        """Waits for the tokens."""
        token_ids = self.wait()
        self._output.sampled_token_ids = [
            [token_ids[self.index[req_id]]] if req_id in self.index else []
            for req_id in self._output.req_ids
        ]
        return self._output
