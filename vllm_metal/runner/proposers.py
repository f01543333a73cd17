"""What guesses the tokens that follow: the n-grams of a request itself, or suffix trees.

The drafts are right or wrong without effect on what is generated (`acceptance`); right ones save
steps.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from vllm_metal.runner.request_batch import RequestBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_input_batch import CachedRequestState


def make_proposer(vllm_config: "VllmConfig") -> "Proposer | None":
    """The proposer that `--speculative-config` names; None without one.

    The platform has refused methods that are not served (`options/speculation.py`).
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    return SuffixTrees(vllm_config) if speculative.method == "suffix" else NGrams(vllm_config)


class Proposer(ABC):
    """Guesses the next tokens of each request.

    Args:
        vllm_config: vLLM's configuration, with the number of drafts.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        self.most = vllm_config.num_speculative_tokens

    def propose(self, batch: RequestBatch, newest: list[list[int]]) -> list[list[int]]:
        """Drafts for each row of the batch.

        A request gets no more than it may still generate behind the next token. One that has not
        sampled gets none, nor does one with a budget of thinking tokens, which vLLM's sampler
        counts once a step.

        Args:
            batch: with all tokens that are sampled.
            newest: tokens of each row that the last step has sampled.
        """
        drafts = self.guess(batch, newest)
        for row, req_id in enumerate(batch.rows.req_ids):
            del drafts[row][room(batch.requests[req_id]) if newest[row] else 0 :]
        return drafts

    @abstractmethod
    def guess(self, batch: RequestBatch, newest: list[list[int]]) -> list[list[int]]:
        """`propose` before drafts are cut off; `most` for each row at most."""


def room(request: "CachedRequestState") -> int:
    """Drafts of a request that may count."""
    params = request.sampling_params
    assert params is not None
    if params.thinking_token_budget is not None:
        return 0
    if params.max_tokens is None:
        return 1 << 30
    return max(0, params.max_tokens - len(request.output_token_ids) - 1)


class NGrams(Proposer):
    """What followed the last tokens of a request where it had them before.

    The drafts are those of vLLM's `NgramProposer`, whose module needs numba: the longest of the
    request's last `prompt_lookup_min` to `prompt_lookup_max` tokens that it contains once more, and
    the first place that has them.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        super().__init__(vllm_config)
        speculative = vllm_config.speculative_config
        assert speculative is not None
        shortest, longest = speculative.prompt_lookup_min, speculative.prompt_lookup_max
        assert shortest is not None and longest is not None, "vLLM has filled in both"
        self._shortest, self._longest = shortest, longest
        self._max_model_len = vllm_config.model_config.max_model_len

    def guess(self, batch: RequestBatch, newest: list[list[int]]) -> list[list[int]]:
        rows, drafts = batch.rows, []
        for row, tokens in enumerate(newest):
            known = rows.token_ids_cpu[row, : rows.num_tokens_no_spec[row]]
            most = min(self.most, self._max_model_len - len(known)) if tokens else 0
            drafts.append(after_n_gram(known, self._shortest, self._longest, most))
        return drafts


def after_n_gram(
    token_ids: np.ndarray,  # [S]
    shortest: int,
    longest: int,
    most: int,
) -> list[int]:
    """The `most` tokens, or fewer, that followed the last tokens where they stood before.

    As many of the last tokens are sought as stand anywhere else: `longest` at most, and none are
    proposed where fewer than `shortest` do. Of several places the first counts.
    """
    if most <= 0:
        return []
    last, length = len(token_ids) - 1, 0
    ends = np.flatnonzero(token_ids[:last] == token_ids[last])
    while len(ends) and length < longest:
        found, length = ends, length + 1
        ends = found[found >= length]
        ends = ends[token_ids[ends - length] == token_ids[last - length]]
    if length < shortest:
        return []
    follows = int(found[0]) + 1
    return token_ids[follows : follows + most].tolist()


class SuffixTrees(Proposer):
    """vLLM's suffix decoding, which learns from the answers to all requests."""

    def __init__(self, vllm_config: "VllmConfig"):
        super().__init__(vllm_config)
        from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

        self._trees = SuffixDecodingProposer(vllm_config)

    def guess(self, batch: RequestBatch, newest: list[list[int]]) -> list[list[int]]:
        drafts = self._trees.propose(self.most, batch.rows, newest)
        return [list(of_row) for of_row in drafts]
