"""Mistakes in structured outputs are refused, and what looks like one is not."""

import json

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_metal.options.structured_outputs import check

TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
    "allOf": [{"$ref": "#/$defs/a~1b%20c"}],
    "$defs": {"a/b c": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
}
"""Refers to itself within its items and as one of two alternatives."""


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"$ref": "#"}, "'#'"),
        ({"allOf": [{"$ref": "#"}]}, "'#'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "#/$defs/a"),
        (
            {
                "properties": {"x": {"$ref": "#/$defs/a"}},
                "$defs": {"a": {"allOf": [{}, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
            },
            "#/$defs/a",
        ),
        ({"items": [{"$ref": "#/items/0"}]}, "#/items/0"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_a_schema_that_refers_to_itself_alone_is_refused(schema, named, text):
    given = StructuredOutputsParams(json=json.dumps(schema) if text else schema)
    with pytest.raises(VLLMValidationError, match="refers to itself") as refusal:
        check(given)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com"},
        {"const": {"$ref": "#/const"}},
        {},
    ],
)
def test_other_references_are_not(schema):
    check(StructuredOutputsParams(json=schema))


def test_a_rule_with_two_definitions_is_refused_by_name():
    grammar = 'root ::= a-b\n  a-b ::= "1"\na-b::= "2"'
    with pytest.raises(VLLMValidationError, match="rule 'a-b' is defined 2 times"):
        check(StructuredOutputsParams(grammar=grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= a | b\na ::= "b ::= a"\nb ::= "b ::= a"\n# b ::= a',
        'start: "a"\n',
    ],
)
def test_other_grammars_are_not(grammar):
    check(StructuredOutputsParams(grammar=grammar))


def test_other_constraints_are_not():
    check(StructuredOutputsParams(choice=["a", "a"]))
