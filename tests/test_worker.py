"""The worker in the order in which vLLM calls it: memory asked for, promised and kept."""

import re
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import ChunkedKVCache
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.abstract import Executor

from tests.serving import Serving, loaded_worker
from tests.tiny_models import LAYERS, save_checkpoint
from vllm_metal import worker as worker_module
from vllm_metal.errors import UserError
from vllm_metal.machine.device import Device
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.dry_forward import UnsupportedModelError
from vllm_metal.startup import decode_probe

PROMPT = list(range(90))


def test_the_users_bytes_are_the_bytes_for_pages(make_config):
    serving = Serving(make_config(kv_cache_memory_bytes=3 << 20))
    kv_cache = serving.worker.kv_cache
    bytes_per_block = kv_cache.nbytes // kv_cache.num_blocks
    assert 0 <= (3 << 20) - kv_cache.nbytes < bytes_per_block
    assert serving.worker.determine_available_memory() == 3 << 20


def test_memory_follows_utilization(make_config):
    """A tenth of the device less, a tenth of the device less for pages."""
    answers = {}
    for utilization in (0.2, 0.1):
        config = make_config(kv_cache_memory_bytes=None, gpu_memory_utilization=utilization)
        worker = loaded_worker(config)
        answers[utilization] = worker.determine_available_memory()
        limit = worker.metal_device.memory_limit
        spent = worker.plan.weights + worker.plan.workspace
        assert answers[utilization] <= int(limit * utilization) - spent
    assert answers[0.2] - answers[0.1] == pytest.approx(limit / 10, rel=0.01)


def test_the_memory_question_keeps_nothing(make_config):
    worker = loaded_worker(make_config())
    before = mx.get_active_memory()
    worker.determine_available_memory()
    assert mx.get_active_memory() - before < 10_000


def test_the_workspace_is_enough_for_real_prefills(make_config):
    """Without a context and with one, in one chunk and in several."""
    for budget in (256, 32):
        config = make_config(max_num_batched_tokens=budget, enable_prefix_caching=False)
        serving = Serving(config)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        serving.generate([PROMPT, PROMPT[:40], PROMPT[10:]])
        assert mx.get_peak_memory() - before < serving.worker.plan.workspace


def test_mlx_is_told_the_plan(make_config):
    """A later worker of the same process is not held to it."""
    serving = Serving(make_config())
    held = mx.get_active_memory()
    device_limit = serving.worker.metal_device.memory_limit
    limit = mx.set_memory_limit(device_limit)
    assert limit == pytest.approx(held + serving.worker.plan.workspace, abs=1 << 18)
    mx.set_memory_limit(limit)
    serving.worker.init_device()
    assert mx.set_memory_limit(device_limit) == device_limit


def test_too_little_memory_for_one_request(make_config):
    worker = loaded_worker(make_config(kv_cache_memory_bytes=133_000))
    with pytest.raises(UserError, match="Too little memory for one request of 128 tokens"):
        worker.determine_available_memory()


def test_vllm_agrees_that_the_offered_length_fits(make_config):
    worker = loaded_worker(make_config(kv_cache_memory_bytes=133_000))
    with pytest.raises(UserError) as error:
        worker.determine_available_memory()
    offered = int(str(error.value).split("--max-model-len ")[1].split(" ")[0])
    serving = Serving(make_config(kv_cache_memory_bytes=133_000, max_model_len=offered))
    prompt = PROMPT[: offered - 4]
    assert len(serving.generate([prompt], max_tokens=4)[0]) == 4


def asked_with(config, memory: int) -> int:
    """What a worker answers on a device with so much memory, with weights that take none."""
    worker = loaded_worker(config)
    worker.weights = 0
    worker.metal_device = Device("cpu", "a small machine", memory, 0)
    return worker.determine_available_memory()


@pytest.mark.parametrize("max_model_len", [128, -1])
def test_what_too_little_memory_offers_is_enough(make_config, max_model_len):
    """Here the workspace is too large; with `--max-model-len -1` vLLM itself would name nothing."""
    settings = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 1.0}
    settings |= {"max_model_len": max_model_len}
    worker = loaded_worker(make_config(**settings))
    worker.determine_available_memory()
    memory = worker.plan.workspace * 3 // 4
    with pytest.raises(UserError, match="the largest term is the workspace") as error:
        asked_with(make_config(**settings), memory)
    remedies = re.findall(r"remedy: (.*)", str(error.value))[0].split(", or ")
    assert remedies[0].startswith("--max-num-batched-tokens ")
    for remedy in remedies:
        options = re.findall(r"--([\w-]+) (\d+)", remedy)
        offered = {name.replace("-", "_"): int(value) for name, value in options}
        assert offered and asked_with(make_config(**(settings | offered)), memory) > 0


def test_the_length_may_be_fitted_to_the_memory(make_config):
    config = make_config(kv_cache_memory_bytes=133_000, max_model_len=-1)
    serving = Serving(config)
    assert config.model_config.max_model_len == 48
    assert len(serving.generate([PROMPT[:40]], max_tokens=8)[0]) == 8


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"dtype": "float32"}, mx.float32),
        ({"dtype": "bfloat16"}, mx.bfloat16),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, mx.bfloat16),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float16"}, mx.float16),
    ],
    ids=str,
)
def test_the_type_of_pages(make_config, settings, dtype):
    serving = Serving(make_config(**settings))
    assert {array.dtype for array in serving.worker.kv_cache.arrays} == {dtype}
    assert len(serving.generate([PROMPT[:20]])[0]) == 8


@pytest.mark.parametrize("block_size", [8, 32])
def test_the_size_of_blocks(make_config, block_size):
    plain = Serving(make_config()).generate([PROMPT, PROMPT[:9]])
    assert Serving(make_config(block_size=block_size)).generate([PROMPT, PROMPT[:9]]) == plain


def test_rows_are_decoded_together_where_the_model_allows(make_config):
    assert Serving(make_config()).runner.decode.batched


def test_vllm_finds_no_torch_module_to_clean_up_when_its_engine_ends(make_config):
    worker = SimpleNamespace(model_runner=Serving(make_config()).runner)
    engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    assert LLMEngine._get_driver_model_for_cleanup(engine) is None


def test_decode_is_traced_unless_eager_execution_is_asked_for(make_config, monkeypatch):
    assert isinstance(Serving(make_config()).runner.decode.run, DecodeGraphs)
    said = messages_of(monkeypatch, "info")
    runner = Serving(make_config(enforce_eager=True)).runner
    assert runner.decode.batched and runner.decode.run == runner.bound_model.forward
    assert any("is not traced: --enforce-eager" in line for line in said)


@pytest.mark.parametrize(("seed", "same"), [(1, True), (2, False)])
def test_the_seed_decides_what_unseeded_requests_sample(make_config, seed, same):
    sampled = [
        Serving(make_config(seed=seed)).generate([PROMPT], temperature=1.0) for seed in (1, seed)
    ]
    assert (sampled[0] == sampled[1]) == same


def messages_of(monkeypatch, level: str) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(worker_module.logger, level, lambda text, *args: said.append(text % args))
    return said


def test_a_fallback_says_why_and_what_it_costs(make_config, monkeypatch, tmp_path):
    folder = save_checkpoint(
        tmp_path / "model", "gpt_bigcode", architectures=["GPTBigCodeForCausalLM"]
    )
    said = messages_of(monkeypatch, "warning")
    serving = Serving(make_config(model=str(folder)))
    assert not serving.runner.decode.batched
    [line] = [line for line in said if line.startswith("Decode of gpt_bigcode runs one request")]
    assert "it takes one position for all rows" in line and "N times as long" in line


def test_a_step_that_is_not_traced_says_why(make_config, monkeypatch):
    answers = decode_probe.DecodeAnswers(
        decode_probe.Answer(True), decode_probe.Answer(False, "it looks at its numbers")
    )
    monkeypatch.setattr(worker_module.decode_probe, "ask", lambda *_: answers)
    said = messages_of(monkeypatch, "info")
    runner = Serving(make_config()).runner
    assert runner.decode.batched and runner.decode.run == runner.bound_model.forward
    assert any("is not traced: it looks at its numbers. Its Python code" in line for line in said)


def test_an_unservable_model_is_refused_at_load(make_config, monkeypatch):
    config = make_config()
    chunked = [ChunkedKVCache(8) for _ in range(LAYERS)]
    monkeypatch.setattr(llama.Model, "make_cache", lambda _: chunked)
    with pytest.raises(UnsupportedModelError, match="'llama' cannot be served"):
        loaded_worker(config)


def test_an_engine_that_slept_wakes_up(make_config):
    """The scheduler is paused before the worker is told: an error there would leave it paused."""
    worker = loaded_worker(make_config())
    executor = SimpleNamespace(
        sleeping_tags=set(),
        is_sleeping=True,
        collective_rpc=lambda method, kwargs: getattr(worker, method)(**kwargs),
    )
    Executor.sleep(executor, 1)
    assert executor.sleeping_tags
    Executor.wake_up(executor)
    assert not executor.sleeping_tags


def test_what_it_offers(make_config):
    worker = loaded_worker(make_config())
    assert worker.get_supported_tasks() == ("generate",)
    assert worker.get_supported_kv_cache_layouts() == ["LBNHC"]
    assert worker.list_loras() == set()
