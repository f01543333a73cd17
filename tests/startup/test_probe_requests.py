"""The prompts of the probes, and the blocks of their requests."""

import mlx.core as mx
import pytest

from tests.tiny_models import tiny_model
from vllm_metal.attention.metadata import StateMetadata
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup.probe_requests import (
    BLOCK_SIZE,
    TEXTS,
    ProbeRequests,
    on_dense_pages,
    probe_prompts,
)

LENGTHS = list(TEXTS.values())


def with_beginning(text: str) -> list[int]:
    """A tokenizer that begins with token 0 and has one for each word."""
    return [0, *(len(word) + 10 for word in text.split())]


def test_prompts_begin_as_the_tokenizer_begins_them():
    prompts = probe_prompts(with_beginning)
    assert [len(prompt) for prompt in prompts] == LENGTHS
    assert all(prompt[0] == 0 and min(prompt[1:]) > 10 for prompt in prompts)


def test_without_a_tokenizer_they_begin_as_they_are_told_to():
    prompts = probe_prompts(None, [77])
    assert [prompt[0] for prompt in prompts] == [77] * 3
    assert [len(prompt) for prompt in prompts] == LENGTHS
    assert len({prompt[-1] for prompt in prompts}) == 3


def test_texts_of_few_tokens_are_filled_up():
    assert [len(prompt) for prompt in probe_prompts(lambda _: [5])] == LENGTHS


def test_lengths_differ_and_fit_every_block():
    assert len(set(LENGTHS)) == 3 and max(LENGTHS) < 8 <= BLOCK_SIZE


@pytest.mark.parametrize("model_type", ["gemma3_text", "jamba"])
@pytest.mark.parametrize("apart", [True, False])
def test_no_block_has_two_owners(model_type, apart):
    """Where groups may share memory, a block belongs to one group, too."""
    binding = ModelBinding(tiny_model(model_type))
    backends = [DensePages(shape, BLOCK_SIZE, mx.float32) for shape in binding.layers]
    kv_cache = KVCache(backends, 8, binding.states)
    requests = ProbeRequests(binding.bind(kv_cache), probe_prompts(None), groups_apart=apart)
    assert len(kv_cache.groups) == 2
    assert requests.fit is True
    _, metadata = requests.decode_inputs([0, 1, 2])
    blocks = [
        (group.read_ids if isinstance(group, StateMetadata) else group.block_table[:, 0]).tolist()
        for group in metadata
    ]
    owners = blocks if not apart else [blocks[0] + blocks[1]]
    assert all(len(set(ids)) == len(ids) and 0 not in ids for ids in owners)


def test_dense_pages_of_the_probe_hold_the_prompts():
    binding = ModelBinding(tiny_model("llama"))
    requests = on_dense_pages(binding, probe_prompts(None))
    assert requests.fit
    logits = requests.decode_anew([0, 2])
    assert logits.shape[0] == 2 and mx.isfinite(logits).all().item()
    assert all(array[1:].any() and not array[0].any() for array in requests.kv_cache.arrays)
