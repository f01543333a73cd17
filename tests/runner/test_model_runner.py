"""Steps of the runner under vLLM's own scheduler: mlx-lm's tokens, however the work is cut."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import RequestStatus

from tests.serving import Serving
from tests.tiny_models import VOCABULARY, save_checkpoint, tiny_model
from vllm_metal.runner.pending_tokens import PendingTokens
from vllm_metal.runner.request_batch import PLACEHOLDER

NEW_TOKENS = 20
LENGTHS = (1, 2, 15, 16, 17, 50, 33)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, VOCABULARY, length).tolist()


PROMPTS = [prompt(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """What mlx-lm generates, one prompt at a time, with its own caches."""
    return [
        [int(token) for token, _ in generate_step(mx.array(p), model, max_tokens=NEW_TOKENS)]
        for p in PROMPTS
    ]


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def async_scheduling(request) -> bool:
    return request.param


def test_alone_and_in_one_batch(make_config, async_scheduling, expected):
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    alone = [serving.generate([p], max_tokens=NEW_TOKENS)[0] for p in PROMPTS]
    assert alone == expected
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("most_decode_tokens", [pytest.param(1, marks=pytest.mark.nightly), 70])
def test_decode_in_several_forwards(make_config, async_scheduling, expected, most_decode_tokens):
    """Each request alone, and those together that fit; they change places as they grow."""
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    serving.runner.decode = replace(serving.runner.decode, most_tokens=most_decode_tokens)
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


@pytest.mark.parametrize("budget", [16, 23])
def test_chunked_prefill(make_config, async_scheduling, expected, budget):
    serving = Serving(
        make_config(
            async_scheduling=async_scheduling,
            max_num_batched_tokens=budget,
            enable_prefix_caching=False,
        )
    )
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


def test_requests_that_join_and_leave(make_config, async_scheduling, expected):
    """One more request every other step, each with an end of its own."""
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    requests = []
    for i, token_ids in enumerate(PROMPTS):
        requests.append(serving.add(str(i), token_ids, max_tokens=3 + 2 * i))
        serving.step()
        serving.step()
    serving.run()
    for i, request in enumerate(requests):
        assert list(request.output_token_ids) == expected[i][: 3 + 2 * i]


def test_prefix_cache_hits(make_config, async_scheduling, expected):
    serving = Serving(make_config(async_scheduling=async_scheduling))
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected
    request = serving.add("again", PROMPTS[5], max_tokens=NEW_TOKENS)
    serving.run()
    assert serving.cached_tokens["again"] == 48
    assert list(request.output_token_ids) == expected[5]
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


def test_preemption(make_config, async_scheduling, expected):
    """Blocks for the longest request and little more, so that requests are thrown out."""
    serving = Serving(
        make_config(
            async_scheduling=async_scheduling,
            num_gpu_blocks_override=12,
            enable_prefix_caching=False,
        )
    )
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected
    assert serving.num_preemptions > 0


def test_decode_one_request_at_a_time(make_config, async_scheduling, expected):
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    serving.runner.decode = replace(serving.runner.decode, batched=False)
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


def test_greedy_beside_sampled_requests(make_config, async_scheduling, expected):
    """Torch serves the whole batch while one of its requests needs it, MLX before and after."""
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    requests = [serving.add(str(i), p, max_tokens=NEW_TOKENS) for i, p in enumerate(PROMPTS[:5])]
    for _ in range(4):
        serving.step()
    serving.add("sampled", PROMPTS[5], temperature=1.0, seed=3, max_tokens=6)
    serving.run()
    assert [list(request.output_token_ids) for request in requests] == expected[:5]


def test_an_aborted_request_and_its_name_used_again(make_config, async_scheduling, expected):
    serving = Serving(make_config(async_scheduling=async_scheduling, enable_prefix_caching=False))
    other = serving.add("other", PROMPTS[3], max_tokens=NEW_TOKENS)
    serving.add("name", PROMPTS[4], max_tokens=NEW_TOKENS)
    for _ in range(4):
        serving.step()
    serving.scheduler.finish_requests("name", RequestStatus.FINISHED_ABORTED)
    if async_scheduling:
        serving.step()  # vLLM's scheduler gives a result in flight to whoever has the name
    again = serving.add("name", PROMPTS[5], max_tokens=NEW_TOKENS)
    serving.run()
    assert list(other.output_token_ids) == expected[3]
    assert list(again.output_token_ids) == expected[5]
    assert set(serving.runner.batch.requests) <= {"other", "name"}


@pytest.mark.parametrize("params", [{}, {"top_k": 20, "top_p": 0.9}], ids=["plain", "truncated"])
def test_a_seed_gives_the_same_tokens_under_any_chunking(make_config, params):
    tokens = []
    for budget in (256, 16, 23):
        serving = Serving(make_config(max_num_batched_tokens=budget, enable_prefix_caching=False))
        tokens.append(serving.generate(PROMPTS, temperature=1.0, seed=11, max_tokens=8, **params))
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({tuple(output) for output in tokens[0]}) > 1


def test_logprobs_are_the_models(make_config, model):
    """Of the prompt and of what is sampled, in chunks and at once."""
    token_ids = PROMPTS[5]
    for budget in (256, 16, 49):
        config = make_config(max_num_batched_tokens=budget, enable_prefix_caching=False)
        serving = Serving(config)
        request = serving.add("r", token_ids, logprobs=2, prompt_logprobs=3, max_tokens=4)
        serving.run()
        sequence = token_ids + list(request.output_token_ids)
        logits = np.array(model(mx.array([sequence]))[0])
        logprobs = torch.log_softmax(torch.tensor(logits), -1)

        [scores] = [o.prompt_logprobs_dict["r"] for o in serving.outputs if o.prompt_logprobs_dict]
        targets = torch.tensor(token_ids[1:])
        rows = torch.arange(len(token_ids) - 1)
        assert scores.logprob_token_ids.shape == (49, 4)
        assert torch.equal(scores.logprob_token_ids[:, 0].long(), targets)
        torch.testing.assert_close(
            scores.logprobs[:, 0], logprobs[rows, targets], atol=1e-4, rtol=0
        )

        sampled = [o.logprobs for o in serving.outputs if o.logprobs is not None]
        sampled = [lists for lists in sampled if len(lists.logprobs)][-4:]
        for position, lists in enumerate(sampled, start=len(token_ids) - 1):
            assert lists.logprob_token_ids[0][0] == sequence[position + 1]
            expected = logprobs[position].topk(2)
            np.testing.assert_allclose(lists.logprobs[0][1:], expected.values, atol=1e-4)


def test_a_greedy_step_is_handed_back_before_it_is_computed(make_config):
    serving = Serving(make_config(async_scheduling=True))
    serving.add("r", PROMPTS[4])
    output = None
    for _ in range(2):
        scheduled = serving.scheduler.schedule()
        assert serving.worker.execute_model(scheduled) is None
        output = serving.worker.sample_tokens(None)
        assert isinstance(output, PendingTokens)
    assert serving.runner.batch.requests["r"].output_token_ids[-1] == -1
    [[token]] = output.get_output().sampled_token_ids
    assert 0 <= token < VOCABULARY


def test_one_step_is_computed_at_a_time(make_config, monkeypatch, expected):
    serving = Serving(make_config(async_scheduling=True))
    dispatch, running = serving.runner._dispatch, []

    def checked(*arrays):
        assert not running
        running.append(arrays)
        wait = dispatch(*arrays)

        def waited():
            wait()
            running.clear()

        return waited

    monkeypatch.setattr(serving.runner, "_dispatch", checked)
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == expected


def test_a_step_that_a_request_joins_waits_for_the_one_before(make_config):
    """Its name may be that of a request whose token is still in flight."""
    serving = Serving(make_config(async_scheduling=True))
    for name in ("first", "second"):
        serving.add(name, prompt(1))
        scheduled = serving.scheduler.schedule()
        serving.worker.execute_model(scheduled)
        assert PLACEHOLDER not in serving.runner.batch.requests["first"].output_token_ids
        serving.worker.sample_tokens(None)
        assert serving.runner.batch.requests["first"].output_token_ids[-1] == PLACEHOLDER


def test_a_step_with_the_last_token_of_a_prompt_waits_for_the_one_before(make_config):
    """It is a prompt chunk, though every request advances by one token, as in a decode step."""
    config = make_config(
        async_scheduling=True, max_num_batched_tokens=16, enable_prefix_caching=False
    )
    serving = Serving(config)
    serving.add("first", prompt(4))
    for _ in range(2):
        step(serving)
    serving.add("second", prompt(16))
    assert step(serving) == {"first": 1, "second": 15}
    scheduled = serving.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"first": 1, "second": 1}
    serving.worker.execute_model(scheduled)
    assert PLACEHOLDER not in serving.runner.batch.requests["first"].output_token_ids


def step(serving: Serving) -> dict[str, int]:
    """Schedules and runs a step whose output nobody waits for; tokens of each request."""
    scheduled = serving.scheduler.schedule()
    serving.worker.execute_model(scheduled)
    serving.worker.sample_tokens(None)
    return scheduled.num_scheduled_tokens


def test_a_step_without_tokens(make_config):
    serving = Serving(make_config())
    empty = SchedulerOutput.make_empty()
    assert serving.worker.execute_model(empty) is EMPTY_MODEL_RUNNER_OUTPUT
    assert serving.worker.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT


@pytest.mark.parametrize("budget", [256, 16], ids=["whole prompts", "chunks"])
def test_no_step_copies_an_array_of_pages(make_config, async_scheduling, budget):
    serving = Serving(
        make_config(
            async_scheduling=async_scheduling,
            max_num_batched_tokens=budget,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=128 << 20,
        )
    )
    serving.generate(PROMPTS[:6], max_tokens=4)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    serving.generate(PROMPTS[:6], max_tokens=40)
    page_array = serving.worker.kv_cache.nbytes // len(serving.worker.kv_cache.arrays)
    assert mx.get_peak_memory() - before < page_array // 4


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("gemma3_text", "Gemma3ForCausalLM"),
        pytest.param("jamba", "JambaForCausalLM", marks=pytest.mark.nightly),
    ],
)
def test_no_step_copies_an_array_that_layers_share(
    make_config, tmp_path, async_scheduling, model_type, architecture
):
    folder = save_checkpoint(tmp_path / "model", model_type, architectures=[architecture])
    config = make_config(
        model=str(folder),
        async_scheduling=async_scheduling,
        max_num_batched_tokens=16,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
    )
    serving = Serving(config)
    cache = serving.worker.kv_cache
    assert cache.shares_arrays and cache.nbytes <= 64 << 20
    first = serving.generate(PROMPTS[3:6], max_tokens=20)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert serving.generate(PROMPTS[3:6], max_tokens=20) == first
    smallest = min(array.nbytes for array in cache.arrays)
    assert mx.get_peak_memory() - before < smallest // 4


def test_copied_blocks_are_copied_before_the_step(make_config):
    serving = Serving(make_config())
    serving.generate([PROMPTS[5]])
    cache = serving.worker.kv_cache
    scheduled = SchedulerOutput.make_empty()
    scheduled.kv_cache_block_copies = [(1, 40), (2, 41)]
    serving.worker.execute_model(scheduled)
    for array in cache.arrays:
        assert mx.array_equal(array[40], array[1]) and mx.array_equal(array[41], array[2])
    assert cache.arrays[0][40].any()
