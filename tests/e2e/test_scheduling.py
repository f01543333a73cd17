"""Any mix of requests gives each its own answer, over pages that hold what was read.

The pages are symbolic (`tests/symbolic_pages.py`): there is no model, and a forward pass that would
read what was never written raises.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from tests.symbolic_pages import SymbolicServing, expected_tokens
from tests.traffic import Arrival, prompt, serve
from vllm_metal.kv_cache.spec import KeptStateSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGE_BYTES = 16384
MAX_MODEL_LEN = 128
FULL = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.float32, "page_size_padded": PAGE_BYTES}


def full(block_size: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, **FULL)


def window(block_size: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block_size, sliding_window=40, **FULL)


def state(block_size: int, spare_blocks: int = 0) -> KeptStateSpec:
    return KeptStateSpec(
        block_size=block_size,
        shapes=((64,),),
        dtypes=(torch.uint8,),
        page_size_padded=PAGE_BYTES,
        mamba_cache_mode="align",
        spare_blocks=spare_blocks,
    )


NOT_KEPT = MambaSpec(
    block_size=MAX_MODEL_LEN,
    shapes=((64,),),
    dtypes=(torch.uint8,),
    page_size_padded=PAGE_BYTES,
)


@dataclass(frozen=True)
class Mix:
    """The layers of a model, and how the prefixes of their states are cached."""

    specs: dict[str, KVCacheSpec]
    caches_prefixes: bool = True
    keeps_states: bool = False
    match_unit: int | None = None
    scarce_blocks: int = 20

    def settings(self) -> dict[str, Any]:
        """For vLLM's configuration."""
        return {
            "enable_prefix_caching": self.caches_prefixes,
            "prefix_match_unit": self.match_unit,
        }

    def serving(self, config: "VllmConfig", num_blocks: int) -> SymbolicServing:
        """The scheduler and the runner over symbolic pages of these layers."""
        if self.keeps_states:
            config.cache_config.mamba_cache_mode = "align"
        return SymbolicServing(config, self.specs, num_blocks)


KINDS = {
    "full": Mix({"layers.0": full(16)}),
    "window": Mix({"layers.0": full(16), "layers.1": window(16)}),
    "states": Mix({"layers.0": full(16), "states.0": NOT_KEPT}, caches_prefixes=False),
    "kept states": Mix({"layers.0": full(16), "states.0": state(16)}, keeps_states=True),
    "kept states, found inside of blocks": Mix(
        {"layers.0": full(32), "states.0": state(32, 2), "states.1": state(32, 2)},
        keeps_states=True,
        match_unit=8,
    ),
    "kept states, blocks of two sizes": Mix(
        {"layers.0": full(16), "layers.1": full(32), "states.0": state(16, 3)},
        keeps_states=True,
        match_unit=8,
    ),
    "kept states and a window": Mix(
        {"layers.0": full(16), "layers.1": window(16), "states.0": state(16)},
        keeps_states=True,
        scarce_blocks=30,
    ),
    "kept states alone": Mix({"states.0": state(16, 1)}, keeps_states=True, scarce_blocks=9),
}
BY_DAY = {"full": 2, "window": 2, "states": 1}
"""Seeds of random traffic that are not left to the night; one of any other kind."""
PREFIXES = ["full", "window"]
"""Kinds whose prefixes a request finds in the step in which another one completes them."""


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("length", [16, 32, 48])
def test_a_prefix_that_another_request_completes_in_the_same_step(
    make_config, kind, async_scheduling, length
):
    """vLLM offers a block to others when it schedules its last token, before that is computed."""
    config = make_config(async_scheduling=async_scheduling, max_num_batched_tokens=length - 1)
    serving = KINDS[kind].serving(config, 64)
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


TRAFFIC = [
    pytest.param(
        kind,
        seed,
        async_scheduling,
        marks=[] if seed < BY_DAY.get(kind, 1) else pytest.mark.nightly,
        id=f"{kind}-{seed}-{'async' if async_scheduling else 'sync'}",
    )
    for kind in KINDS
    for seed in range(12)
    for async_scheduling in (True, False)
]


@pytest.mark.parametrize(("kind", "seed", "async_scheduling"), TRAFFIC)
def test_random_traffic(make_config, kind, async_scheduling, seed):
    """Arrivals, shared prefixes, continued answers, chunks, scarce blocks and aborts."""
    rng, mix = random.Random(f"{kind} {seed}"), KINDS[kind]
    config = make_config(
        async_scheduling=async_scheduling,
        max_num_batched_tokens=rng.choice([15, 16, 17, 23, 31, 64, 256]),
        max_model_len=MAX_MODEL_LEN,
        prefix_cache_retention_interval=rng.choice([0, None]) if mix.keeps_states else 0,
        **mix.settings(),
    )
    serving = mix.serving(config, rng.choice([mix.scarce_blocks, 30, 64]))
    vocab_size = config.model_config.get_vocab_size()

    def answer_of(token_ids: list[int], num_tokens: int) -> list[int]:
        return expected_tokens(token_ids, num_tokens, vocab_size)

    def same(arrival: Arrival, answer: list[int]) -> bool:
        return answer == answer_of(arrival.token_ids, arrival.num_tokens)[: len(answer)]

    assert serve(serving, rng, 40, vocab_size, answer_of).wrong(same) == []
    assert any(serving.cached_tokens.values()) == mix.caches_prefixes
