"""TurboQuant pages under vLLM's scheduler: the same tokens however the work is cut."""

import re

import pytest
from vllm import LLM

from tests.e2e import engine as e2e
from tests.near_ties import GreedyAnswer
from tests.runner.test_model_runner import NEW_TOKENS, PROMPTS
from tests.serving import Serving
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS

PAIRS = [
    *((k_quant, "q4_0") for k_quant in KEY_FORMATS),
    *(("q8_0", v_quant) for v_quant in VALUE_FORMATS if v_quant != "q4_0"),
]
"""Every key format and every value format."""

BY_DAY = [("q8_0", "q3_0"), ("uint4", "q4_0")]
"""The default, and few bits with a bias. All others are left to the night."""


def pairs(by_day: list[tuple[str, str]] = BY_DAY) -> list:
    """Parameters for each of `PAIRS`."""
    return [
        pytest.param(*pair, marks=[] if pair in by_day else [pytest.mark.nightly]) for pair in PAIRS
    ]


def settings(k_quant: str, v_quant: str, **more) -> dict:
    return {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant, "allow_lossy": True} | more


NEAR_TIE = 0.05
"""Two logits this close may change places: a matrix product rounds by the shape of its operands,
so a key coordinate at the border of two codes may take either. The logits' deviation is 1."""


def answers(serving: Serving, prompts: list[list[int]]) -> list[GreedyAnswer]:
    """Runs prompts together."""
    first = len(serving.outputs)
    tokens = serving.generate(prompts, max_tokens=NEW_TOKENS, logprobs=2)
    leads: list[list[float]] = [[] for _ in prompts]
    for output in serving.outputs[first:]:
        for name, row in output.req_id_to_index.items():
            if output.sampled_token_ids and output.sampled_token_ids[row]:
                sampled, _, second = output.logprobs.logprobs[row]
                leads[int(name.rsplit("-", 1)[1])].append(float(sampled - second))
    return [GreedyAnswer(*pair, NEAR_TIE) for pair in zip(tokens, leads, strict=True)]


@pytest.mark.parametrize(("k_quant", "v_quant"), pairs())
def test_nothing_but_the_tokens_decides(make_config, reading_model, k_quant, v_quant):
    assert_nothing_but_the_tokens_decides(make_config, reading_model, k_quant, v_quant)


@pytest.mark.nightly
def test_nothing_but_the_tokens_decides_with_levels(make_config, long_heads_model):
    assert_nothing_but_the_tokens_decides(make_config, long_heads_model, "q6_0", "q3_0")


def assert_nothing_but_the_tokens_decides(make_config, model, k_quant, v_quant) -> None:
    """With `reproducible`: alone, in one batch, in chunks, on a cached prefix, preempted."""

    def serving(**more) -> Serving:
        config = settings(k_quant, v_quant, reproducible=True)
        source = {"model": str(model), "skip_tokenizer_init": False}
        return Serving(make_config(additional_config=config, **source, **more))

    cached = serving()
    expected = [answers(cached, [prompt])[0] for prompt in PROMPTS]
    assert answers(cached, PROMPTS) == expected
    assert answers(cached, [PROMPTS[5]]) == [expected[5]]
    assert max(cached.cached_tokens.values()) == 48

    chunked = serving(max_num_batched_tokens=23, enable_prefix_caching=False)
    assert answers(chunked, PROMPTS) == expected

    preempted = serving(num_gpu_blocks_override=12, enable_prefix_caching=False)
    assert answers(preempted, PROMPTS) == expected
    assert preempted.num_preemptions > 0


@pytest.mark.parametrize(("k_quant", "v_quant"), [("q8_0", "q3_0"), ("q4_0", "q4_0")])
def test_alone_is_as_in_a_batch(make_config, reading_model, k_quant, v_quant):
    serving = Serving(
        make_config(
            model=str(reading_model),
            skip_tokenizer_init=False,
            additional_config=settings(k_quant, v_quant),
            enable_prefix_caching=False,
        )
    )
    alone = [answers(serving, [prompt])[0] for prompt in PROMPTS]
    assert answers(serving, PROMPTS) == alone


@pytest.mark.parametrize(("k_quant", "v_quant"), pairs(BY_DAY[:2]))
def test_tokens_grow_by_the_printed_ratio(make_config, reading_model, k_quant, v_quant, caplog):
    """What vLLM's scheduler hands out, against 16-bit pages in the same bytes."""

    def tokens(**more) -> int:
        source = {"model": str(reading_model), "skip_tokenizer_init": False}
        serving = Serving(make_config(kv_cache_memory_bytes=16 << 20, **source, **more))
        return (serving.scheduler.kv_cache_config.num_blocks - 1) * 16

    dense = tokens(kv_cache_dtype="float16")
    caplog.clear()
    compressed = tokens(additional_config=settings(k_quant, v_quant))
    printed = re.search(r"ratio +([\d.]+)x over the whole cache", caplog.text)
    assert compressed / dense == pytest.approx(float(printed[1]), rel=0.01)


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.parametrize(("num_prompts", "num_tokens"), [(4, 32), (8, 64)])
def test_eight_bits_give_the_tokens_of_dense_pages(
    demo_model, demo_engine, num_prompts, num_tokens
):
    """On the real model: prompts and answers of as many tokens, equal up to a near tie."""
    prompts = e2e.prompts(demo_model, [num_tokens] * num_prompts)
    params = e2e.greedy(num_tokens, logprobs=2)

    def generate(llm: LLM) -> list[GreedyAnswer]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [answer(o.outputs[0]) for o in llm.generate(inputs, params, use_tqdm=False)]

    def answer(output) -> GreedyAnswer:
        steps = [sorted(p.logprob for p in step.values()) for step in output.logprobs]
        leads = [step[-1] - step[-2] for step in steps]
        return GreedyAnswer(output.token_ids, leads, NEAR_TIE)

    dense = generate(demo_engine)
    compression = settings("q8_0", "q8_0")
    with e2e.engine(demo_model, max_model_len=160, additional_config=compression) as llm:
        compressed = generate(llm)
    assert dense == compressed
    same = sum(a.tokens == b.tokens for a, b in zip(dense, compressed, strict=True))
    assert same >= 3 * num_prompts // 4, f"{same} of {num_prompts}"
