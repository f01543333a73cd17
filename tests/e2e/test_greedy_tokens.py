"""The engine's greedy tokens are mlx-lm's, however the scheduler cuts the work.

On the real model. `test_models.py` has the same for a tiny model of each kind.
"""

import pytest

from tests.e2e import engine as e2e

pytestmark = [pytest.mark.engine, pytest.mark.nightly]


@pytest.fixture(scope="module")
def prompts(demo_model):
    return e2e.prompts(demo_model)


@pytest.fixture(scope="module")
def expected(demo_model, prompts):
    return e2e.mlx_lm_tokens(demo_model, prompts, e2e.NEW_TOKENS)


def test_alone_in_a_batch_and_after_prefix_hits(demo_engine, prompts, expected):
    demo_engine.reset_prefix_cache()
    for i in (0, -1):
        assert e2e.generate(demo_engine, [prompts[i]]) == [expected[i]]
    assert e2e.num_cached_tokens(demo_engine, prompts[-1]) >= 480
    assert e2e.generate(demo_engine, prompts) == expected
    demo_engine.reset_prefix_cache()
    assert e2e.generate(demo_engine, prompts) == expected


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_chunked_prefill_and_preemption(demo_model, prompts, expected, async_scheduling):
    settings = e2e.CHUNKS_IN_FEW_BLOCKS
    with e2e.engine(demo_model, async_scheduling=async_scheduling, **settings) as llm:
        assert e2e.generate(llm, prompts) == expected
        assert e2e.num_preemptions(llm) > 0
