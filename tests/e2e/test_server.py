"""`vllm serve` as a user runs it, through the official `openai` client."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import SERVED_MODEL as MODEL
from tests.e2e.conftest import metric

pytestmark = pytest.mark.engine

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


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


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


def weather_in_rome(client, tool, max_tokens):
    """What is answered with this tool, which must be used."""
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=max_tokens,
    )


def test_tool_call_with_a_named_tool(client):
    message = weather_in_rome(client, WEATHER, max_tokens=96).choices[0].message
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
    assert metric(server, "vllm:num_requests_running") == 1
    stream.close()
    for _ in range(60):
        if metric(server, "vllm:num_requests_running") == 0:
            break
        time.sleep(0.25)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_bad_request_is_a_client_error_and_the_server_lives_on(client):
    with pytest.raises(openai.BadRequestError, match="maximum"):
        client.completions.create(model=MODEL, prompt="word " * 3000, max_tokens=5)
    assert client.models.list().data[0].id == MODEL


ITSELF = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "'root' is defined 2 times"),
        ({"grammar": "((("}, "Invalid grammar"),
        ({"json": {"$ref": "#"}}, "refers to itself"),
        ({"json": ITSELF}, "refers to itself"),
        ({"json": {"type": "banana"}}, "Invalid type: banana"),
        ({"json": "no JSON"}, "Invalid JSON grammar"),
        ({"choice": []}, "cannot be an empty list"),
        ({"regex": "(a"}, "unclosed group"),
        ({}, "must use one kind"),
    ],
    ids=str,
)
def test_a_bad_constraint_is_a_client_error_with_the_reason(client, constraint, reason):
    question = {"model": MODEL, "prompt": "The sky is", "max_tokens": 2, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match=re.escape(reason)):
        client.completions.create(**question, extra_body={"structured_outputs": constraint})
    assert client.completions.create(**question).usage.completion_tokens == 2


def test_a_tool_whose_parameters_refer_to_themselves_is_a_client_error(client):
    tool = {"type": "function", "function": WEATHER["function"] | {"parameters": ITSELF}}
    with pytest.raises(openai.BadRequestError, match="refers to itself"):
        weather_in_rome(client, tool, max_tokens=8)


@pytest.mark.nightly
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
