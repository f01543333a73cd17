"""TurboQuant pages under vLLM's scheduler: the same tokens however the work is cut."""

from pathlib import Path

import pytest

from tests.e2e import engine as e2e
from tests.serving import Serving
from tests.test_model_runner import NEW_TOKENS, PROMPTS
from tests.tiny_models import save_checkpoint, save_tokenizer
from vllm_metal.metal_kernel_backend.turboquant.formats import KEY_FORMATS, VALUE_FORMATS

PAIRS = [
    *((k_quant, "q4_0") for k_quant in KEY_FORMATS),
    *(("q8_0", v_quant) for v_quant in VALUE_FORMATS if v_quant != "q4_0"),
]
"""Every key format and every value format."""


def settings(k_quant: str, v_quant: str, **more) -> dict:
    return {"turboquant": True, "k_quant": k_quant, "v_quant": v_quant, "allow_lossy": True} | more


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama that reads characters: calibration needs a tokenizer."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "characters")
    save_tokenizer(folder)
    return folder


NEAR_TIE = 0.05
"""Two logits this close may change places: a matrix product rounds by the shape of its operands,
so a key coordinate at the border of two codes may take either. The logits' deviation is 1."""


class Answer:
    """Greedy tokens of one request, and by how much each was ahead of the next best."""

    def __init__(self, tokens: list[int], leads: list[float]):
        self.tokens, self.leads = tokens, leads

    def __eq__(self, other: "Answer") -> bool:
        """Equal up to the first near tie."""
        for mine, theirs, lead in zip(self.tokens, other.tokens, self.leads, strict=True):
            if mine != theirs:
                return lead < NEAR_TIE
        return True

    def __repr__(self) -> str:
        pairs = zip(self.tokens, self.leads, strict=True)
        return " ".join(f"{token}({lead:.2f})" for token, lead in pairs)


def answers(serving: Serving, prompts: list[list[int]]) -> list[Answer]:
    """Runs prompts together."""
    first = len(serving.outputs)
    tokens = serving.generate(prompts, max_tokens=NEW_TOKENS, logprobs=2)
    leads: list[list[float]] = [[] for _ in prompts]
    for output in serving.outputs[first:]:
        for name, row in output.req_id_to_index.items():
            if output.sampled_token_ids and output.sampled_token_ids[row]:
                sampled, _, second = output.logprobs.logprobs[row]
                leads[int(name.rsplit("-", 1)[1])].append(float(sampled - second))
    return [Answer(*pair) for pair in zip(tokens, leads, strict=True)]


@pytest.mark.parametrize(("k_quant", "v_quant"), PAIRS)
def test_nothing_but_the_tokens_decides(make_config, model, k_quant, v_quant):
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
def test_alone_is_as_in_a_batch(make_config, model, k_quant, v_quant):
    serving = Serving(
        make_config(
            model=str(model),
            skip_tokenizer_init=False,
            additional_config=settings(k_quant, v_quant),
            enable_prefix_caching=False,
        )
    )
    alone = [serving.generate([p], max_tokens=NEW_TOKENS)[0] for p in PROMPTS]
    assert serving.generate(PROMPTS, max_tokens=NEW_TOKENS) == alone


def test_eight_bits_give_the_tokens_of_dense_pages(demo_model):
    """On the real model: at least 7 of 8 prompts, 64 new tokens each."""
    prompts = e2e.prompts(demo_model)
    expected = e2e.mlx_lm_tokens(demo_model, prompts, e2e.NEW_TOKENS)
    with e2e.engine(demo_model, additional_config=settings("q8_0", "q8_0")) as llm:
        tokens = e2e.generate(llm, prompts)
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    assert same >= 7, f"{same} of 8"
