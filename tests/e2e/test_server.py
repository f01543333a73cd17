"""`vllm serve` as a user runs it, through the official `openai` client."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import openai
import pytest

from tests.tiny_models import save_checkpoint, save_tokenizer

pytestmark = pytest.mark.engine

MODEL = "smollm2"
LLAMA = "LlamaForCausalLM"
NAN_CHARACTER = "~"
"""In no text but that of the request that is to fail."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@contextlib.contextmanager
def serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """A running server of this model under the name `MODEL`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", *options),
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None or _answers(address):
                break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield address
        served = log.read_text()
        assert "Traceback" not in served
        assert "KV cache plan" in served
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory) -> Iterator[str]:
    """Address of a running server with the demo model."""
    options = [
        *("--max-model-len", "2048", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(400 << 20)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    with serve(demo_model, tmp_path_factory.mktemp("server") / "log", *options) as address:
        yield address


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


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


def test_chat_and_stream_give_the_same_answer(client):
    question = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = client.chat.completions.create(**question).choices[0].message.content
    assert answer == "The capital of France is Paris."
    chunks = list(client.chat.completions.create(**question, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer
    assert len(chunks) > 5


def test_logprobs_rank_the_greedy_token_first(client):
    choice = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count to five."}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    ).choices[0]
    for token in choice.logprobs.content:
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert len(token.top_logprobs) == 3


def test_a_prompt_is_scored_as_it_was_generated(client):
    """Greedy tokens, given back as the end of a prompt, have the log-probabilities they had."""
    answer = client.completions.create(
        model=MODEL,
        prompt="The sky is blue because",
        temperature=0,
        max_tokens=6,
        logprobs=1,
        extra_body={"return_token_ids": True},
    ).choices[0]
    prompt_logprobs = (
        client.completions.create(
            model=MODEL,
            prompt=answer.prompt_token_ids + answer.token_ids,
            max_tokens=1,
            extra_body={"prompt_logprobs": 1},
        )
        .choices[0]
        .prompt_logprobs
    )
    assert len(prompt_logprobs) == len(answer.prompt_token_ids) + 6
    assert prompt_logprobs[0] is None
    scores = zip(
        answer.token_ids, answer.logprobs.token_logprobs, prompt_logprobs[-6:], strict=True
    )
    for token, logprob, scored in scores:
        assert scored[str(token)]["rank"] == 1
        assert scored[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-3)


def test_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Alan"]}, "age": {"enum": [36, 41]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    content = (
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Describe Ada Lovelace as JSON."}],
            max_tokens=64,
            temperature=1.0,
            seed=3,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": schema},
            },
        )
        .choices[0]
        .message.content
    )
    person = json.loads(content)
    assert person["name"] in ("Ada", "Alan") and person["age"] in (36, 41)


def test_tool_call_with_a_named_tool(client):
    message = (
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "How is the weather in Rome?"}],
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
            max_tokens=96,
        )
        .choices[0]
        .message
    )
    call = message.tool_calls[0].function
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


def test_a_client_that_goes_away_frees_its_blocks(server, client):
    stream = client.completions.create(
        model=MODEL,
        prompt="Once upon a time",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert _metric(server, "vllm:num_requests_running") == 1
    stream.close()
    for _ in range(60):
        if _metric(server, "vllm:num_requests_running") == 0:
            break
        time.sleep(0.25)
    assert _metric(server, "vllm:num_requests_running") == 0
    assert _metric(server, "vllm:kv_cache_usage_perc") == 0


def test_bad_request_is_a_client_error_and_the_server_lives_on(client):
    with pytest.raises(openai.BadRequestError, match="maximum"):
        client.completions.create(model=MODEL, prompt="word " * 3000, max_tokens=5)
    assert client.models.list().data[0].id == MODEL


def test_bench_serve_completes_without_failures(server, demo_model, tmp_path):
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("bench", "serve", "--base-url", server, "--model", MODEL),
        *("--tokenizer", str(demo_model), "--dataset-name", "random"),
        *("--num-prompts", "16", "--max-concurrency", "8", "--ignore-eos"),
        *("--random-input-len", "24", "--random-output-len", "6"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Successful requests:\s+16", done.stdout), done.stdout
    assert re.search(r"Failed requests:\s+0", done.stdout), done.stdout


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
        request = {"model": MODEL, "prompt": prompt, "max_tokens": 24} | params
        return client.completions.create(**request).choices[0].text

    healthy = ["alone", "a neighbour of it", "of a longer prompt, " * 3]
    expected = [answer(prompt) for prompt in healthy]
    counted = _metric(address, "vllm:corrupted_requests_total")
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(answer, prompt) for prompt in healthy[:2]]
        failing = threads.submit(answer, f"with {NAN_CHARACTER} in it")
        answers.append(threads.submit(answer, healthy[2]))
        with pytest.raises(openai.InternalServerError):
            failing.result()
        assert [given.result() for given in answers] == expected
    assert _metric(address, "vllm:corrupted_requests_total") == counted + 1
    assert _metric(address, "vllm:num_requests_running") == 0
    assert "its logits are not finite" in log.read_text()
    assert "custom scheduler" not in log.read_text()


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=2).status == 200
    except OSError:
        return False


def _metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    assert values, f"{name} is not at /metrics"
    return float(values[0])
