"""Models that use their caches in other ways than a plain decoder, in the engine.

Prompts of unequal lengths are cut into chunks, alone and together, with and without hits in the
prefix cache; the greedy tokens are always mlx-lm's own.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests.e2e import engine as e2e
from tests.tiny_models import VOCABULARY, save_checkpoint, save_tokenizer

LENGTHS = (5, 41, 20)
NEW_TOKENS = 12
CHUNK = 16

ARCHITECTURES = {
    "gemma4_text": "Gemma4ForCausalLM",  # shared keys and values
    "afm7": "AFMForCausalLM",  # the same, unknown to vLLM, one request at a time
    "deepseek_v3": "DeepseekV3ForCausalLM",  # MLA
    "deepseek_v32": "DeepseekV32ForCausalLM",  # MLA with an index, two caches in a layer
    "gemma2": "Gemma2ForCausalLM",  # soft-capped scores, one request at a time
    "mixtral": "MixtralForCausalLM",  # mixture of experts
    "openelm": "OpenELMForCausalLM",  # another number of KV heads in every layer
}


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY - 1, length).tolist() for length in LENGTHS]


def own_tokens(folder: Path) -> list[list[int]]:
    model, _ = load_model(folder)
    return [
        [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)]
        for prompt in prompts()
    ]


def tiny_engine(folder: Path, **settings):
    small = {"max_model_len": 128, "kv_cache_memory_bytes": 8 << 20, "block_size": 8}
    return e2e.engine(folder, **small, max_num_batched_tokens=CHUNK, max_num_seqs=4, **settings)


def generate(llm, token_ids: list[list[int]]) -> list[list[int]]:
    params = e2e.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    return e2e.generate(llm, token_ids, params)


def saved(folder: Path, model_type: str, **changes) -> Path:
    save_checkpoint(folder, model_type, architectures=[ARCHITECTURES[model_type]], **changes)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_tokens_are_mlx_lms(tmp_path, model_type):
    folder = saved(tmp_path / "model", model_type)
    expected = own_tokens(folder)
    with tiny_engine(folder) as llm:
        assert [generate(llm, [prompt])[0] for prompt in prompts()] == expected
        assert generate(llm, prompts()) == expected  # after hits in the prefix cache
        llm.reset_prefix_cache()
        assert generate(llm, prompts()) == expected


def test_a_quantised_checkpoint(tmp_path):
    folder = tmp_path / "model"
    save_checkpoint(folder, quantization={"group_size": 32, "bits": 4})
    save_tokenizer(folder)
    with tiny_engine(folder) as llm:
        assert generate(llm, prompts()) == own_tokens(folder)


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma2"])
def test_compressed_a_batch_gives_what_its_requests_give(tmp_path, model_type):
    folder = saved(tmp_path / "model", model_type, head_dim=32)
    turboquant = {"turboquant": True, "k_quant": "q8_0", "v_quant": "q4_0", "reproducible": True}
    with tiny_engine(folder, additional_config=turboquant) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts()]
        llm.reset_prefix_cache()
        assert generate(llm, prompts()) == alone
