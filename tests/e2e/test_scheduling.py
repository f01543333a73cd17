"""Any mix of requests gives each its own answer, over pages that hold what was read.

The pages are symbolic (`tests/symbolic_pages.py`): there is no model, and a forward pass that would
read what was never written raises.
"""

import random

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from tests.symbolic_pages import SymbolicServing, expected_tokens
from tests.traffic import Arrival, prompt, serve

PAGE_BYTES = 4096
MAX_MODEL_LEN = 128
FULL = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.float32, "page_size_padded": PAGE_BYTES}
KINDS = {
    "full": {"layers.0": FullAttentionSpec(block_size=16, **FULL)},
    "window": {
        "layers.0": FullAttentionSpec(block_size=16, **FULL),
        "layers.1": SlidingWindowSpec(block_size=16, sliding_window=40, **FULL),
    },
    "states": {
        "layers.0": FullAttentionSpec(block_size=16, **FULL),
        "states.0": MambaSpec(
            block_size=MAX_MODEL_LEN,
            shapes=((64,),),
            dtypes=(torch.uint8,),
            page_size_padded=PAGE_BYTES,
        ),
    },
}
PREFIXES = [kind for kind in KINDS if kind != "states"]
"""Kinds of caches whose prefixes are found again."""


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("length", [16, 32, 48])
def test_a_prefix_that_another_request_completes_in_the_same_step(
    make_config, kind, async_scheduling, length
):
    """vLLM offers a block to others when it schedules its last token, before that is computed."""
    config = make_config(async_scheduling=async_scheduling, max_num_batched_tokens=length - 1)
    serving = SymbolicServing(config, KINDS[kind], 64)
    vocab_size = config.model_config.get_vocab_size()
    shared = prompt(random.Random(0), length, vocab_size)
    first = serving.add("first", shared, max_tokens=4)
    serving.step()
    longer = shared + prompt(random.Random(1), 10, vocab_size)
    second = serving.add("second", longer, max_tokens=4)
    serving.run()
    hit = length if kind == "full" else length - 16  # a window is not matched to its last block
    assert serving.cached_tokens["second"] == hit
    assert list(first.output_token_ids) == expected_tokens(shared, 4, vocab_size)
    assert list(second.output_token_ids) == expected_tokens(longer, 4, vocab_size)


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[] if i < 4 else pytest.mark.nightly) for i in range(12)]
)
def test_random_traffic(make_config, kind, async_scheduling, seed):
    """Arrivals, shared prefixes, continued answers, chunks, scarce blocks and aborts."""
    rng = random.Random(f"{kind} {seed}")
    config = make_config(
        async_scheduling=async_scheduling,
        max_num_batched_tokens=rng.choice([15, 16, 17, 23, 31, 64, 256]),
        enable_prefix_caching=kind in PREFIXES,
        max_model_len=MAX_MODEL_LEN,
    )
    serving = SymbolicServing(config, KINDS[kind], rng.choice([20, 30, 64]))
    vocab_size = config.model_config.get_vocab_size()

    def answer_of(token_ids: list[int], num_tokens: int) -> list[int]:
        return expected_tokens(token_ids, num_tokens, vocab_size)

    def same(arrival: Arrival, answer: list[int]) -> bool:
        return answer == answer_of(arrival.token_ids, arrival.num_tokens)[: len(answer)]

    assert serve(serving, rng, 40, vocab_size, answer_of).wrong(same) == []
