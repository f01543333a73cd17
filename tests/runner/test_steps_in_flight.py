"""Steps that are dispatched while others run: right tokens whenever they run, and no memory lost.

The kernels run when MLX evaluates (`LazyTarget`), as on a GPU.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from tests.runner.test_pending_tokens import no_report
from tests.serving import Serving
from tests.tiny_models import VOCABULARY, save_checkpoint, save_tokenizer
from vllm_metal.metal_kernel_backend import selection
from vllm_metal.runner.pending_tokens import PendingTokens
from vllm_metal.runner.request_batch import PLACEHOLDER, RequestBatch
from vllm_metal.runner.steps_in_flight import MAX_STEPS, StepsInFlight


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng([length]).integers(0, VOCABULARY, length).tolist()


PROMPTS = [prompt_of(length) for length in (17, 30, 50, 40)]
NEW_TOKENS = 24


@pytest.fixture(
    scope="module",
    params=[
        {"turboquant": True, "k_quant": "q8_0", "v_quant": "q8_0", "allow_lossy": True},
        pytest.param({}, marks=pytest.mark.nightly),
    ],
    ids=["compressed", "dense"],
)
def serving(request, tmp_path_factory) -> Iterator[Serving]:
    """Layers with windows, which give blocks back while a request goes on, and few blocks.

    The kernels write the pages.
    """
    folder = tmp_path_factory.mktemp("models") / "windows"
    save_checkpoint(folder, "gemma3_text", architectures=["Gemma3ForCausalLM"])
    save_tokenizer(folder)
    config = EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        num_gpu_blocks_override=18,
        kv_cache_memory_bytes=4 << 20,
        additional_config=request.param,
        async_scheduling=True,
        enable_prefix_caching=False,
    ).create_engine_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "available_target", LazyTarget)
        serving = Serving(config)
        assert serving.worker.kv_cache.stores_through
        yield serving


def at_once(*arrays) -> Callable[[], None]:
    mx.eval(*arrays)
    return lambda: None


def as_late_as_can_be(*arrays) -> Callable[[], None]:
    """Nothing runs before it is waited for, or something that depends on it is evaluated."""
    return lambda: mx.eval(*arrays)


def answers(serving: Serving) -> list[list[int]]:
    """Requests join, blocks slide out of windows, and there are too few blocks for all."""
    requests, preemptions = [], serving.num_preemptions
    for i, token_ids in enumerate(PROMPTS):
        requests.append(serving.add(str(i), token_ids, max_tokens=NEW_TOKENS + 5 * i))
        for _ in range(3):
            serving.step()
    serving.run()
    assert serving.num_preemptions > preemptions
    return [list(request.output_token_ids) for request in requests]


@needs_lazy_target
def test_tokens_are_the_same_whenever_a_step_runs(serving, monkeypatch):
    by_the_server = answers(serving)
    monkeypatch.setattr(serving.runner, "_dispatch", at_once)
    expected = answers(serving)
    monkeypatch.setattr(serving.runner, "_dispatch", as_late_as_can_be)
    assert answers(serving) == expected
    assert by_the_server == expected


@needs_lazy_target
def test_blocks_are_copied_after_the_step_in_flight(serving, monkeypatch):
    monkeypatch.setattr(serving.runner, "_dispatch", as_late_as_can_be)
    request = serving.add("copied", PROMPTS[0])
    for _ in range(3):
        serving.step()
    cache = serving.worker.kv_cache
    blocks = serving.runner.batch.requests["copied"].block_ids
    scheduled = SchedulerOutput.make_empty()
    scheduled.kv_cache_block_copies = [(table[-1], 17) for table in blocks[:1]]
    serving.worker.execute_model(scheduled)
    pages = [array for array in cache.arrays if array.ndim == 2]
    cache.evaluate()
    for array in pages:
        assert mx.array_equal(array[17], array[blocks[0][-1]])
    serving.scheduler.finish_requests("copied", RequestStatus.FINISHED_ABORTED)
    serving.run()
    assert request.num_output_tokens


@needs_lazy_target
def test_a_step_is_dispatched_while_one_runs_and_no_third_one(serving, monkeypatch):
    dispatch, running, most = serving.runner._dispatch, [], []

    def counted(*arrays):
        wait = dispatch(*arrays)
        running.append(wait)
        most.append(len(running))

        def waited():
            wait()
            running.remove(wait)

        return waited

    monkeypatch.setattr(serving.runner, "_dispatch", counted)
    serving.generate(PROMPTS[:1], max_tokens=NEW_TOKENS)
    assert max(most) == MAX_STEPS
    assert not running


@needs_lazy_target
def test_memory_does_not_grow_with_the_steps(serving):
    serving.generate(PROMPTS[:1], max_tokens=100)
    held, peaks = [], []
    for _ in range(3):
        mx.reset_peak_memory()
        serving.generate(PROMPTS[:1], max_tokens=100)
        peaks.append(mx.get_peak_memory())
        held.append(mx.get_active_memory())
    assert max(held) <= held[0] and max(peaks) < peaks[0] + (64 << 10)


@needs_lazy_target
def test_the_memory_plan_has_room_for_two_steps(serving):
    assert serving.worker.step_memory.decodes_at_once == MAX_STEPS


@pytest.fixture
def filled(monkeypatch) -> list[tuple[str, int, int]]:
    """What `fill_placeholder` is called with."""
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        RequestBatch, "fill_placeholder", lambda _, *arguments: calls.append(arguments)
    )
    return calls


def step(name: str, token: int, waits: list[str] | None = None) -> PendingTokens:
    output = ModelRunnerOutput(req_ids=[name], req_id_to_index={name: 0})
    tokens, finite = mx.array([token], mx.int32), mx.array([True])
    wait = (lambda: waits.append(name)) if waits is not None else lambda: None
    return PendingTokens(tokens, finite, wait, {name: 3}, output, [], no_report)


def test_steps_are_finished_in_order_and_their_tokens_put_into_the_batch(make_config, filled):
    steps, waits = StepsInFlight(RequestBatch(make_config(), [])), []
    assert steps.newest is None
    older, newer = step("a", 7, waits), step("b", 8, waits)
    steps.add(older)
    steps.add(newer)
    steps.finish(but=1)
    assert waits == ["a"] and filled == [("a", 3, 7)]
    assert steps.newest is newer
    steps.finish()
    assert waits == ["a", "b"] and filled[1:] == [("b", 3, 8)]
    assert steps.newest is None


def test_a_third_step_is_refused(make_config):
    steps = StepsInFlight(RequestBatch(make_config(), []))
    for name in "ab":
        steps.add(step(name, 1))
    with pytest.raises(RuntimeError, match="while 2 others were in flight"):
        steps.add(step("c", 1))


def test_a_step_that_a_request_joins_waits_for_the_one_before(make_config):
    """Its name may be that of a request whose token is still in flight."""
    serving = Serving(make_config(async_scheduling=True))
    for name in ("first", "second"):
        serving.add(name, prompt_of(1))
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
    serving.add("first", prompt_of(4))
    for _ in range(2):
        scheduled_step(serving)
    serving.add("second", prompt_of(16))
    assert scheduled_step(serving) == {"first": 1, "second": 15}
    scheduled = serving.scheduler.schedule()
    assert scheduled.num_scheduled_tokens == {"first": 1, "second": 1}
    serving.worker.execute_model(scheduled)
    assert PLACEHOLDER not in serving.runner.batch.requests["first"].output_token_ids


def scheduled_step(serving: Serving) -> dict[str, int]:
    """Schedules and runs a step whose output nobody waits for; tokens of each request."""
    scheduled = serving.scheduler.schedule()
    serving.worker.execute_model(scheduled)
    serving.worker.sample_tokens(None)
    return scheduled.num_scheduled_tokens
