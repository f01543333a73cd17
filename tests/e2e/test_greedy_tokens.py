"""The engine's greedy tokens are mlx-lm's, however the scheduler cuts the work."""

import pytest

from tests.e2e import engine as e2e


@pytest.fixture(scope="module")
def prompts(demo_model):
    return e2e.prompts(demo_model)


@pytest.fixture(scope="module")
def expected(demo_model, prompts):
    return e2e.mlx_lm_tokens(demo_model, prompts, e2e.NEW_TOKENS)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_alone_in_a_batch_and_after_prefix_hits(demo_model, prompts, expected, async_scheduling):
    with e2e.engine(demo_model, async_scheduling=async_scheduling) as llm:
        alone = range(len(prompts)) if async_scheduling else (0, len(prompts) - 1)
        assert [e2e.generate(llm, [prompts[i]])[0] for i in alone] == [expected[i] for i in alone]
        assert e2e.num_cached_tokens(llm, prompts[-1]) >= 640
        assert e2e.generate(llm, prompts) == expected
        llm.reset_prefix_cache()
        assert e2e.generate(llm, prompts) == expected


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_chunked_prefill_and_preemption(demo_model, prompts, expected, async_scheduling):
    """The pool holds the longest request and little more, so requests are preempted."""
    with e2e.engine(
        demo_model,
        async_scheduling=async_scheduling,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=66,
        enable_prefix_caching=False,
        max_model_len=800,
        disable_log_stats=False,
    ) as llm:
        assert e2e.generate(llm, prompts) == expected
        assert e2e.num_preemptions(llm) > 0
