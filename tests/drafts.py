"""A proposer that knows the answers, and is right as often as a test wants."""

import random
from collections.abc import Callable

from vllm.config import VllmConfig

from vllm_metal.runner.proposers import Proposer
from vllm_metal.runner.request_batch import RequestBatch

AnswerOf = Callable[[list[int], int], list[int]]
"""The answer to a prompt, of as many tokens or more."""


class Guesses(Proposer):
    """Drafts of any number, of which each is right with a probability.

    Args:
        vllm_config: vLLM's configuration, with the most drafts of a request.
        answer_of: the right answers.
        right: the probability.
        rng: decides.
    """

    def __init__(
        self, vllm_config: VllmConfig, answer_of: AnswerOf, right: float, rng: random.Random
    ):
        super().__init__(vllm_config)
        self._answer_of, self._right, self._rng = answer_of, right, rng
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._max_model_len = vllm_config.model_config.max_model_len

    def guess(self, batch: RequestBatch, newest: list[list[int]]) -> list[list[int]]:
        return [self._drafts(batch, req_id) for req_id in batch.rows.req_ids]

    def _drafts(self, batch: RequestBatch, req_id: str) -> list[int]:
        request = batch.requests[req_id]
        known = len(request.output_token_ids)
        count = min(self._rng.randrange(self.most + 1), self._max_model_len - request.num_tokens)
        answer = self._answer_of(list(request.prompt_token_ids or ()), known + count)
        return [
            token if self._rng.random() < self._right else self._rng.randrange(self._vocab_size)
            for token in answer[known : known + count]
        ]
