"""The engine's greedy tokens are mlx-lm's, however the scheduler cuts the work."""

import pytest

from tests.e2e import engine as e2e

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("demo engines")]


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


def test_chunked_prefill_and_preemption(chunking_engine, prompts, expected):
    before = e2e.num_preemptions(chunking_engine)
    assert e2e.generate(chunking_engine, prompts) == expected
    assert e2e.num_preemptions(chunking_engine) > before


@pytest.mark.nightly
def test_chunked_prefill_and_preemption_with_synchronous_scheduling(demo_model, prompts, expected):
    settings = e2e.CHUNKS_IN_FEW_BLOCKS
    with e2e.engine(demo_model, async_scheduling=False, **settings) as llm:
        assert e2e.generate(llm, prompts) == expected
        assert e2e.num_preemptions(llm) > 0
