"""Prefixes on disk over two lives of an engine: the same tokens, and nothing computed twice."""

from pathlib import Path

import numpy as np
import pytest
from vllm import LLM

from tests.e2e import engine as e2e
from tests.tiny_models import VOCABULARY, save_checkpoint, save_tokenizer

BLOCK = 16
PROMPTS = [
    np.random.default_rng([7, length]).integers(0, VOCABULARY, length).tolist()
    for length in (37, 200, 333)
]
FULL_BLOCKS = [len(prompt) // BLOCK * BLOCK for prompt in PROMPTS]
NEW_TOKENS = 8

# Compressed pages give the same tokens after a hit, in memory or on disk, with "reproducible".
KINDS = {
    "dense": ("llama", {}, {}),
    "compressed": ("llama", {"head_dim": 64}, {"turboquant": True, "reproducible": True}),
    "windows": ("gemma3_text", {"architectures": ["Gemma3ForCausalLM"]}, {}),
}

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint and the settings of its pages."""
    name, changes, pages = KINDS[request.param]
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / name, name, **changes)
    save_tokenizer(folder)
    return folder, pages


def live(kind: tuple[Path, dict], store: Path | None, **settings):
    """A server's life; the context gives the engine."""
    folder, pages = kind
    more = {"kv_store": str(store)} if store else {}
    defaults = {
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 30 << 20,
        "additional_config": pages | more,
    }
    return e2e.engine(folder, **(defaults | settings))


def answer(llm: LLM) -> tuple[list[list[int]], list[int]]:
    """Tokens of each prompt, and how many of its tokens were not computed."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, e2e.greedy(NEW_TOKENS), use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, [output.num_cached_tokens for output in outputs]


def files(store: Path) -> list[Path]:
    return sorted(store.rglob("*.bin"))


def test_a_second_life_computes_no_full_block_again(kind, tmp_path):
    store = tmp_path / "pages"
    with live(kind, None) as llm:
        expected, _ = answer(llm)
    with live(kind, store) as llm:
        assert answer(llm) == (expected, [0, 0, 0])
    written = files(store)
    assert written
    sizes = {path.stat().st_size for path in written}
    with live(kind, store) as llm:
        cache = llm.llm_engine.model_executor.driver_worker.worker.kv_cache
        pages = {cache.block_bytes(group) for group in range(len(cache.groups))}
        assert {size - 36 for size in sizes} == pages
        assert all(size < 1.01 * (size - 36) for size in sizes)
        assert answer(llm) == (expected, FULL_BLOCKS)
    assert files(store) == written
    # Another setting of the same model loads nothing.
    with live(kind, store, max_model_len=480) as llm:
        assert answer(llm)[1] == [0, 0, 0]


def test_damaged_files_and_a_full_disk_change_no_token(kind, tmp_path, monkeypatch):
    store = tmp_path / "pages"
    with live(kind, store) as llm:
        expected, _ = answer(llm)
    random = np.random.default_rng(0)
    damaged = [files(store)[i] for i in random.permutation(len(files(store)))[:20]]
    for number, path in enumerate(damaged):
        content = bytearray(path.read_bytes())
        if number % 4 == 0:
            content = content[: number * 7]
        elif number % 4 == 1:
            content[random.integers(len(content))] ^= 1 << random.integers(8)
        elif number % 4 == 2:
            content = bytearray(len(content))
        else:
            content = bytearray(files(store)[0].read_bytes()) + b"?"
        path.write_bytes(content)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_metal.kv_store.page_file.write", full)
    with live(kind, store) as llm:
        assert answer(llm)[0] == expected
        assert answer(llm)[0] == expected


def test_two_servers_share_a_folder(kind, tmp_path):
    """What one of them writes while both run, the other one finds."""
    store = tmp_path / "pages"
    with live(kind, store) as first, live(kind, store) as second:
        expected, _ = answer(first)
        first.llm_engine.model_executor.driver_worker.worker.model_runner.close()
        assert answer(second) == (expected, FULL_BLOCKS)
