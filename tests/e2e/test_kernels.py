"""The engine on the kernels, run on the CPU, against the engine on MLX operations.

`HostTarget` runs a kernel while its launch is built, so that decode cannot be traced; `LazyTarget`
runs it when MLX evaluates, in traced steps too, as a GPU does.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.e2e import engine as e2e
from tests.e2e.kinds import KINDS
from tests.metal_kernel_backend.lazy_target import LazyTarget, needs_lazy_target
from tests.runner.test_model_runner import PROMPTS
from vllm_metal.metal_kernel_backend import selection
from vllm_metal.metal_kernel_backend.host_target import HostTarget
from vllm_metal.metal_kernel_backend.paged.splits import Gpu

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)

SHARING_KINDS = ("gpt_oss", "qwen3_next", "gemma4_shared", "deepseek_v32")

Answer = list[tuple[int, float, float]]
"""(token, its log-probability, its lead over the next best) of each step."""


def generate(model: Path, k_quant: str | None, v_quant: str | None) -> list[Answer]:
    """Answers to all prompts, run together; long prompts come in chunks. None: dense pages."""
    settings = {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant, "allow_lossy": True}
    if k_quant is None:
        settings = {}
    limits = {"max_model_len": 128, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 4 << 20}
    with e2e.engine(model, additional_config=settings, **limits) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(completion) -> Answer:
    answer = []
    for token, step in zip(completion.token_ids, completion.logprobs, strict=True):
        second = max(choice.logprob for other, choice in step.items() if other != token)
        answer.append((token, step[token].logprob, step[token].logprob - second))
    return answer


@pytest.fixture
def use_kernels(monkeypatch) -> Callable[[type[HostTarget]], list[str]]:
    """Makes the next engines run the kernels; gives the names of those that they build.

    On the host target their short requests are split as long ones are, and merged; on the lazy one
    each is a single split.
    """
    gpu_of = Gpu.of

    def use(target: type[HostTarget]) -> list[str]:
        built = []
        if target is HostTarget:
            monkeypatch.setattr(
                Gpu, "of", lambda *arguments: replace(gpu_of(*arguments), one_split_tokens=0)
            )

        class Recording(target):
            def build(self, kernel, resident=None):
                built.append(kernel.name)
                return super().build(kernel, resident)

        monkeypatch.setattr(selection, "available_target", Recording)
        return built

    return use


@pytest.mark.parametrize(
    ("model", "k_quant", "v_quant", "tolerance", "target"),
    [
        pytest.param(
            *("reading_model", "q8_0", "q8_0", 0.02, HostTarget), marks=pytest.mark.nightly
        ),
        pytest.param("reading_model", "q8_0", "q8_0", 0.02, LazyTarget, marks=needs_lazy_target),
        ("reading_model", "q8_0", "q3_0", 0.05, HostTarget),
        pytest.param(
            *("long_heads_model", "q8_0", "q8_0", 0.02, HostTarget), marks=pytest.mark.nightly
        ),
    ],
)
def test_the_kernels_answer_as_the_reference_path(
    request, use_kernels, model, k_quant, v_quant, tolerance, target
):
    """Log-probabilities agree, and tokens part at near ties only; with 8 bits, nowhere.

    The kernels round keys and queries to half. That moves a coordinate of a new token over the
    edge of its cell now and then, by 1/128 of the largest coordinate with 8 bits, by 1/4 with 3.
    """
    folder = request.getfixturevalue(model)
    expected = generate(folder, k_quant, v_quant)
    built = use_kernels(target)
    answers = generate(folder, k_quant, v_quant)
    assert {"turboquant_store", "turboquant_decode"} <= set(built)
    assert ("turboquant_merge" in built) is (target is HostTarget)
    for answer, reference in zip(answers, expected, strict=True):
        for (token, logprob, _), (other, other_logprob, lead) in zip(
            answer, reference, strict=True
        ):
            if token != other:
                assert lead < tolerance and v_quant != "q8_0"
                break
            assert abs(logprob - other_logprob) < tolerance


@pytest.mark.parametrize(
    ("model", "target"),
    [
        pytest.param("reading_model", HostTarget, marks=pytest.mark.nightly),
        pytest.param("reading_model", LazyTarget, marks=needs_lazy_target),
        pytest.param("long_heads_model", HostTarget, marks=pytest.mark.nightly),
    ],
)
def test_dense_pages_answer_on_the_kernels_as_on_operations(request, use_kernels, model, target):
    """The same tokens everywhere: in float32, both sum the same products in another order."""
    folder = request.getfixturevalue(model)
    expected = generate(folder, None, None)
    built = use_kernels(target)
    answers = generate(folder, None, None)
    assert {"dense_store", "dense_decode", "dense_gather"} <= set(built)
    assert ("dense_merge" in built) is (target is HostTarget)
    for answer, reference in zip(answers, expected, strict=True):
        assert [token for token, *_ in answer] == [token for token, *_ in reference]
        for (_, logprob, _), (_, other, _) in zip(answer, reference, strict=True):
            assert abs(logprob - other) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in SHARING_KINDS], ids=str)
@needs_lazy_target
def test_dense_layers_that_share_pages_with_others_answer_as_on_operations(
    tmp_path, use_kernels, kind
):
    """Windows with sinks, recurrent states, latents that a model fetches: on the kernels the pages
    of a layer hold what others left in the same bytes."""
    folder = kind.save(tmp_path)
    expected = generate(folder, None, None)
    built = use_kernels(LazyTarget)
    answers = generate(folder, None, None)
    assert "dense_store" in built
    for answer, reference in zip(answers, expected, strict=True):
        assert [token for token, *_ in answer] == [token for token, *_ in reference]
