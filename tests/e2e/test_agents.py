"""What coding agents ask of a server, through the official `anthropic` and `openai` clients.

The demo model is too small to choose a tool by itself: these tests name the tool.
"""

import json
import re
from pathlib import Path

import anthropic
import openai
import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from tests.e2e.conftest import SERVED_MODEL as MODEL

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

PAGE = Path(__file__).parents[2] / "docs/agents.md"
QUESTION = {"role": "user", "content": "Which file sets the version?"}
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string", "enum": ["setup.py", "pyproject.toml"]}},
    "required": ["path"],
    "additionalProperties": False,
}
READ_FILE = {
    "name": "read_file",
    "description": "Reads a file.",
    "input_schema": SCHEMA,
    "strict": True,
}
SYSTEM = "You are a coding assistant. " + "Answer with the tools that you are given. " * 20


@pytest.fixture
def messages(server):
    return anthropic.Anthropic(base_url=server, api_key="none").messages


@pytest.fixture
def responses(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none").responses


def turn(*conversation, **more):
    return {
        "model": MODEL,
        "system": SYSTEM,
        "messages": list(conversation),
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
        **more,
    }


def with_tool(*conversation):
    choice = {"type": "tool", "name": "read_file"}
    return turn(*conversation, tools=[READ_FILE], tool_choice=choice, max_tokens=96)


def test_messages_and_their_stream_say_the_same(messages):
    answer = messages.create(**turn(QUESTION))
    [block] = answer.content
    assert answer.stop_reason in ("end_turn", "max_tokens") and block.text
    with messages.stream(**turn(QUESTION)) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens


def test_messages_call_a_tool_and_go_on_from_its_result(messages):
    """The next turn begins with this one, and finds it in the prefix cache."""
    answer = messages.create(**with_tool(QUESTION))
    [call] = [block for block in answer.content if block.type == "tool_use"]
    assert call.name == "read_file" and call.input["path"] in SCHEMA["properties"]["path"]["enum"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": 'version = "1.2"'}
    next_turn = turn(
        QUESTION,
        {
            "role": "assistant",
            "content": [call.model_dump(include={"type", "id", "name", "input"})],
        },
        {"role": "user", "content": [result]},
        tools=[READ_FILE],
    )
    answer = messages.create(**next_turn)
    assert answer.content and answer.usage.cache_read_input_tokens >= 160


def test_a_streamed_tool_call_is_whole(messages):
    with messages.stream(**with_tool(QUESTION)) as stream:
        parts = [e.delta.partial_json for e in stream if e.type == "content_block_delta"]
        [call] = [b for b in stream.get_final_message().content if b.type == "tool_use"]
    assert json.loads("".join(parts)) == call.input
    assert call.input["path"] in SCHEMA["properties"]["path"]["enum"]


def test_tokens_are_counted_as_they_are_computed(messages):
    counted = messages.count_tokens(model=MODEL, system=SYSTEM, messages=[QUESTION]).input_tokens
    usage = messages.create(**turn(QUESTION)).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def ask(**more):
    return {
        "model": MODEL,
        "instructions": SYSTEM,
        "input": [QUESTION],
        "max_output_tokens": 24,
        "temperature": 0,
        **more,
    }


def test_responses_and_their_stream_say_the_same(responses):
    answer = responses.create(**ask())
    events = list(responses.create(**ask(), stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == answer.output_text != ""
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_responses_call_a_tool(responses):
    tool = {"type": "function", "name": "read_file", "parameters": SCHEMA, "strict": True}
    choice = {"type": "function", "name": "read_file"}
    answer = responses.create(**ask(tools=[tool], tool_choice=choice, max_output_tokens=96))
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert json.loads(call.arguments)["path"] in SCHEMA["properties"]["path"]["enum"]


def test_the_parsers_that_the_page_names_are_vllms():
    page = PAGE.read_text()
    rows = re.findall(r"^\| [^|]+ \| `([\w-]+)` \| (?:`([\w-]+)`|none) \|$", page, re.MULTILINE)
    assert len(rows) > 8
    assert {tool for tool, _ in rows} <= set(ToolParserManager.lazy_parsers)
    assert {reasoning for _, reasoning in rows if reasoning} <= set(
        ReasoningParserManager.lazy_parsers
    )
