"""A server whose model computes NaN for one request: that request alone ends with an error."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import openai
import pytest

from tests.e2e.conftest import SERVED_MODEL, metric, serve
from tests.tiny_models import save_checkpoint, save_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

LLAMA = "LlamaForCausalLM"
NAN_CHARACTER = "~"
"""In no text but that of the request that is to fail."""


@pytest.fixture(scope="module")
def damaged_server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """Address and log of a server of a tiny model; the embedding of one character is NaN."""
    folder = save_checkpoint(tmp_path_factory.mktemp("damaged"), architectures=[LLAMA])
    save_tokenizer(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.embed_tokens.weight"][ord(NAN_CHARACTER) - ord(" ")] = mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    log = folder / "log"
    options = "--max-model-len", "128", "--kv-cache-memory-bytes", str(16 << 20)
    with serve(folder, log, *options) as address:
        yield address, log


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1, "seed": 3},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
        {"temperature": 0, "extra_body": {"structured_outputs": {"regex": "[a-z]{20}"}}},
        {"temperature": 0, "extra_body": {"prompt_logprobs": 1}},
    ],
    ids=str,
)
def test_nan_logits_end_one_request_with_a_server_error(damaged_server, params):
    """Its neighbours in the batch get the answers that they get without it."""
    address, log = damaged_server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def answer(prompt: str) -> str:
        request = {"model": SERVED_MODEL, "prompt": prompt, "max_tokens": 24} | params
        return client.completions.create(**request).choices[0].text

    healthy = ["alone", "a neighbour of it", "of a longer prompt, " * 3]
    expected = [answer(prompt) for prompt in healthy]
    counted = metric(address, "vllm:corrupted_requests_total")
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(answer, prompt) for prompt in healthy[:2]]
        failing = threads.submit(answer, f"with {NAN_CHARACTER} in it")
        answers.append(threads.submit(answer, healthy[2]))
        with pytest.raises(openai.InternalServerError):
            failing.result()
        assert [given.result() for given in answers] == expected
    assert metric(address, "vllm:corrupted_requests_total") == counted + 1
    assert metric(address, "vllm:num_requests_running") == 0
    assert "its logits are not finite" in log.read_text()
    assert "custom scheduler" not in log.read_text()
