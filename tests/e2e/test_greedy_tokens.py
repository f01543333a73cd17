"""The engine's greedy tokens are mlx-lm's, however the scheduler cuts the work.

On the real model. `test_models.py` has the same for a tiny model of each kind.
"""

import pytest

from tests.e2e import engine as e2e

pytestmark = pytest.mark.engine

BY_DAY = slice(1, 3)
"""Prompts of whole blocks, and of a part of a block at the end."""


@pytest.fixture(scope="module")
def prompts(demo_model):
    return e2e.prompts(demo_model)


def expected(demo_model, prompts, new_tokens=e2e.NEW_TOKENS):
    return e2e.mlx_lm_tokens(demo_model, prompts, new_tokens)


def test_in_a_batch_and_after_prefix_hits(demo_model, demo_engine, prompts):
    prompts = prompts[BY_DAY]
    tokens = expected(demo_model, prompts, 8)
    demo_engine.reset_prefix_cache()
    assert e2e.generate(demo_engine, prompts, e2e.greedy(8)) == tokens
    assert e2e.num_cached_tokens(demo_engine, prompts[-1]) >= 240
    assert e2e.generate(demo_engine, prompts, e2e.greedy(8)) == tokens


@pytest.mark.nightly
def test_alone_in_a_batch_and_after_prefix_hits(demo_model, demo_engine, prompts):
    tokens = expected(demo_model, prompts)
    demo_engine.reset_prefix_cache()
    for i in (0, -1):
        assert e2e.generate(demo_engine, [prompts[i]]) == [tokens[i]]
    assert e2e.num_cached_tokens(demo_engine, prompts[-1]) >= 480
    assert e2e.generate(demo_engine, prompts) == tokens
    demo_engine.reset_prefix_cache()
    assert e2e.generate(demo_engine, prompts) == tokens


@pytest.mark.nightly
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_chunked_prefill_and_preemption(demo_model, prompts, async_scheduling):
    tokens = expected(demo_model, prompts)
    settings = e2e.CHUNKS_IN_FEW_BLOCKS
    with e2e.engine(demo_model, async_scheduling=async_scheduling, **settings) as llm:
        assert e2e.generate(llm, prompts) == tokens
        assert e2e.num_preemptions(llm) > 0
