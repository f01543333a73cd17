"""The result of a step that MLX is still computing."""

from collections.abc import Sequence
from threading import Lock

import mlx.core as mx
import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_metal.runner.dispatch import Wait
from vllm_metal.runner.nan_logits import Report


class PendingTokens(AsyncModelRunnerOutput):
    """Tokens of a greedy step that MLX is still computing."""

    def __init__(
        self,
        tokens: mx.array,  # [R] int32, being computed
        finite: mx.array,  # [R] bool, whether a token could be chosen
        wait_until_computed: Wait,
        positions: dict[str, int],
        output: ModelRunnerOutput,
        prompts_with_nans: Sequence[str],
        report_nans: Report,
    ):
        self.tokens = tokens
        self._finite = finite
        self._wait_until_computed = wait_until_computed
        self.positions = positions
        """Request -> position of its token in the request; in the order of `tokens`."""
        self.index = {req_id: i for i, req_id in enumerate(positions)}
        self._output = output
        self._report_nans = report_nans
        self._lock = Lock()
        self._token_ids: list[int] | None = None
        self._with_nans = list(prompts_with_nans)

    def wait(self) -> list[int]:
        """Waits until the step is computed; its tokens, in the order of `positions`.

        vLLM may ask from another thread than the runner's.
        """
        with self._lock:
            if self._token_ids is None:
                self._wait_until_computed()
                self._token_ids = np.array(self.tokens).tolist()
                finite = zip(self.positions, np.array(self._finite), strict=True)
                self._with_nans += [req_id for req_id, is_finite in finite if not is_finite]
            return self._token_ids

    def get_output(self) -> ModelRunnerOutput:
        """Waits for the tokens."""
        token_ids = self.wait()
        sampled = self.index.keys() - set(self._with_nans)
        self._output.sampled_token_ids = [
            [token_ids[self.index[req_id]]] if req_id in sampled else []
            for req_id in self._output.req_ids
        ]
        self._report_nans(self._output, self._with_nans)
        return self._output
