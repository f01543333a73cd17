"""Three short prompts, and requests of them in a cache without a scheduler."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_metal.attention.metadata import GroupMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.kv_cache.group_metadata import decode_metadata, prefill_metadata
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.model.model_binding import BoundModel, ModelBinding

if TYPE_CHECKING:
    from vllm.config import ModelConfig

DecodeStep = Callable[[mx.array, Sequence[GroupMetadata]], mx.array]
"""`BoundModel.forward` of a decode step, or a trace of it."""

TEXTS = {
    "The harbour was quiet in the morning, and the boats lay still.": 7,
    "Once upon a time there was a lighthouse at the end of the world.": 4,
    "Twelve of the machines were sold before the end of the week.": 5,
}
"""Texts, and how many of their tokens are read: no two equally many, and fewer than a block."""
TOKEN_IDS = (3, 1, 4, 15, 9, 2, 6)
"""For a model without a tokenizer, and for texts of fewer tokens."""
BLOCK_SIZE = 16


def probe_prompts(
    encode: Callable[[str], Sequence[int]] | None, beginning: Sequence[int] = ()
) -> list[list[int]]:
    """Three short prompts that begin as the model's prompts do.

    A model that was trained with a token at the beginning computes abnormal numbers without it.

    Args:
        encode: the tokenizer's, which adds such a token by itself; None where there is none.
        beginning: what a prompt begins with, for a model without a tokenizer.
    """
    prompts = []
    for i, (text, count) in enumerate(TEXTS.items()):
        token_ids = list(beginning) if encode is None else list(encode(text))
        prompts.append([*token_ids, *TOKEN_IDS[2 * i :], *TOKEN_IDS][:count])
    return prompts


def prompts_of(model_config: "ModelConfig") -> list[list[int]]:
    """Prompts that begin as the tokenizer of this model begins one."""
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is not None:
        return probe_prompts(tokenizer.encode)
    first = getattr(model_config.hf_text_config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < model_config.get_vocab_size():
        return probe_prompts(None, [first])
    return probe_prompts(None, [])  # none, or a default that lies outside the vocabulary


def on_dense_pages(binding: ModelBinding, prompts: Sequence[Sequence[int]]) -> "ProbeRequests":
    """The prompts in a cache of their own, which keeps keys and values as they are."""
    backends = [DensePages(shape, BLOCK_SIZE, mx.float32) for shape in binding.layers]
    kv_cache = KVCache(backends, 1 + len(prompts), binding.states)
    return ProbeRequests(binding.bind(kv_cache), prompts, groups_apart=False)


class ProbeRequests:
    """Short requests in a cache, each with a block of its own in every KV group.

    Args:
        model: over the pages.
        prompts: of the requests; none longer than a block.
        groups_apart: whether groups may share memory, so that a block is one group's alone.
    """

    def __init__(
        self, model: BoundModel, prompts: Sequence[Sequence[int]], groups_apart: bool = True
    ):
        self.model = model
        self.kv_cache = model.kv_cache
        self.prompts = prompts
        self._apart = len(self.kv_cache.groups) if groups_apart else 1

    @property
    def fit(self) -> bool:
        """Whether there are blocks for all requests."""
        return self.kv_cache.num_blocks > self._apart * len(self.prompts)

    def prefill(self) -> None:
        """All but the last token of each prompt."""
        for request, prompt in enumerate(self.prompts):
            tables = [table[0] for table in self._tables([request])]
            metadata = prefill_metadata(self.kv_cache.groups, tables, 0, len(prompt) - 1)
            self.model.evaluate(mx.array([list(prompt[:-1])]), metadata)

    def decode_anew(self, requests: Sequence[int]) -> mx.array:
        """`decode` after `prefill`: a recurrent state moves on with every decode."""
        self.prefill()
        return self.decode(requests)

    def decode(self, requests: Sequence[int], step: DecodeStep | None = None) -> mx.array:
        """Logits [B, vocabulary], float32, of the last token of each request's prompt.

        By the model's own forward pass, unless another `step` is given.
        """
        logits = (step or self.model.forward)(*self.decode_inputs(requests))
        logits = logits[:, -1].astype(mx.float32)
        self.kv_cache.evaluate(logits)
        return logits

    def decode_inputs(self, requests: Sequence[int]) -> tuple[mx.array, tuple[GroupMetadata, ...]]:
        """Token ids [B, 1] and the metadata of each group."""
        prompts = [self.prompts[request] for request in requests]
        positions = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        metadata = decode_metadata(self.kv_cache.groups, self._tables(requests), positions)
        return mx.array([prompt[-1:] for prompt in prompts]), metadata

    def _tables(self, requests: Sequence[int]) -> list[np.ndarray]:
        """The block tables [B, 1] of each group."""
        first = 1 + self._apart * np.array(requests, np.int32)[:, None]
        return [first + group % self._apart for group in range(len(self.kv_cache.groups))]
