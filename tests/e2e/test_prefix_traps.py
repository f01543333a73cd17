"""What goes wrong around cached recurrent states, over symbolic pages, and what is done about it.

Each trap is shown to exist: with the block sizes that this package avoids, vLLM's scheduler serves
wrong states, lets a prompt wait, or never admits it.
"""

import random

import pytest

from tests.e2e.test_scheduling import KINDS, Mix, full, state
from tests.symbolic_pages import WrongReadError, expected_tokens
from tests.traffic import prompt
from vllm_metal.attention.page_sizes import StateCaching
from vllm_metal.kv_cache.spec import capacity

KEPT = KINDS["kept states"]
INSIDE = KINDS["kept states, found inside of blocks"]


def text(length: int, seed: int = 0) -> list[int]:
    return prompt(random.Random(seed), length, 90)


def answers(serving, name: str, token_ids: list[int], num_tokens: int = 4) -> tuple[list[int], int]:
    """The answer to a request that is alone, and its tokens from the prefix cache."""
    request = serving.add(name, token_ids, max_tokens=num_tokens)
    serving.run()
    return list(request.output_token_ids), serving.cached_tokens[name]


def test_a_state_block_that_is_not_the_smallest_block_serves_wrong_states(make_config):
    """vLLM ends chunks at multiples of 16, and files a state after 48 tokens as one after 64."""
    config = make_config(max_num_batched_tokens=48, prefix_cache_retention_interval=None)
    mix = Mix({"layers.0": full(16), "states.0": state(32)}, keeps_states=True)
    serving = mix.serving(config, 64)
    answers(serving, "first", text(115))
    with pytest.raises(WrongReadError, match="states|group 1"):
        answers(serving, "second", text(115)[:66] + text(20, seed=1))


@pytest.mark.parametrize(("block_size", "starts"), [(64, False), (72, True), (56, True)])
def test_a_block_just_under_the_budget_lets_a_new_prompt_wait(make_config, block_size, starts):
    """Until the request that decodes is finished: its token is missing for a whole block."""
    caching = StateCaching(chunk_tokens=64, step_tokens=64, max_requests=8)
    assert caching.starves(block_size) != starts
    mix = Mix({"layers.0": full(block_size), "states.0": state(block_size)}, keeps_states=True)
    serving = mix.serving(make_config(max_num_batched_tokens=64, max_model_len=256), 64)
    first = serving.add("first", text(10), max_tokens=40)
    serving.step()
    serving.step()
    serving.add("second", text(150, seed=1), max_tokens=2)
    for _ in range(6):
        serving.step()
    assert len(first.output_token_ids) < 12
    assert ("second" in serving.cached_tokens) == starts


def test_of_a_request_its_prompts_last_boundary_is_kept_alone(make_config):
    """What it generates is read again in the next turn; every boundary is kept if asked for."""
    found = {}
    for interval in (0, None):
        serving = KEPT.serving(make_config(prefix_cache_retention_interval=interval), 64)
        answer, _ = answers(serving, "first", text(40), num_tokens=40)
        _, found[interval] = answers(serving, "next turn", text(40) + answer + text(5, seed=1))
    assert found == {0: 32, None: 64}


def test_a_shared_prefix_is_kept_once_a_second_request_has_it(make_config):
    """The second of three recomputes three shared blocks, and leaves their state to the third."""
    serving = KEPT.serving(make_config(), 64)
    found = []
    for i in range(3):
        token_ids = text(50) + text(40, seed=1 + i)
        answer, cached = answers(serving, str(i), token_ids)
        assert answer == expected_tokens(token_ids, 4, 96)
        found.append(cached)
    assert found == [0, 0, 48]


def test_prefixes_inside_of_a_block_are_found_and_copied(make_config):
    """A block of 32 tokens with a unit of 8: 56 of 60 tokens, and not 32."""
    serving = INSIDE.serving(make_config(**INSIDE.settings()), 64)
    copies = []
    copy_blocks = serving.pages.copy_blocks
    serving.pages.copy_blocks = lambda pairs: (copies.extend(pairs), copy_blocks(pairs))
    answers(serving, "first", text(60))
    answer, cached = answers(serving, "second", text(60) + text(9, seed=1))
    assert answer == expected_tokens(text(60) + text(9, seed=1), 4, 96)
    assert cached == 56 and copies


SEEDS = [pytest.param(seed, marks=[pytest.mark.nightly] * (seed > 0)) for seed in range(6)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].keeps_states])
def test_a_pool_that_just_holds_a_request_serves_many(make_config, kind, seed):
    """One after the other, with prefixes that end inside of blocks, which are copied.

    Without `spare_blocks` some of these never end: vLLM admits no request whose copies do not fit.
    """
    mix, rng = KINDS[kind], random.Random(seed)
    config = make_config(**mix.settings(), max_num_batched_tokens=rng.choice([24, 64, 256]))
    config.cache_config.mamba_cache_mode = "align"
    smallest = capacity(config, mix.specs, 0, 128).blocks_needed(128)
    serving = mix.serving(config, smallest)
    shared, requests = text(60, seed), []
    for i in range(8):
        token_ids = shared[: rng.choice([30, 60])] + text(rng.choice([0, 5, 40]), 8 * seed + i)
        num_tokens = 128 - len(token_ids)
        requests.append((token_ids, serving.add(str(i), token_ids, max_tokens=num_tokens)))
        if rng.random() < 0.5:
            serving.run()
    serving.run()
    for token_ids, request in requests:
        expected = expected_tokens(token_ids, 128 - len(token_ids), 96)
        assert list(request.output_token_ids) == expected


def test_a_pool_without_room_for_copies_is_refused(make_config):
    """By vLLM's own check, which asks the spec."""
    blocks = 4 + 2 * (2 + 2)  # of 128 tokens, and of states and copies in each of two groups
    INSIDE.serving(make_config(**INSIDE.settings()), 1 + blocks)
    with pytest.raises(ValueError, match="KV cache is needed"):
        INSIDE.serving(make_config(**INSIDE.settings()), blocks - 1)
