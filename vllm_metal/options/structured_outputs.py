"""Structured outputs of a request that vLLM accepts, and that are a mistake of the user.

vLLM checks a constraint with xgrammar. What xgrammar refuses goes to llguidance, which lets two
mistakes pass: it takes the last of two rules of one name, and it answers a schema that refers to
itself, and to nothing else, with an empty text.
"""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

_RULE = re.compile(r"^\s*([\w-]+)\s*::=", re.MULTILINE)
"""The beginning of a rule of a grammar in GBNF."""

_VALUES = ("const", "default", "enum", "examples")
"""Keys of a schema that hold values, which may look like schemas."""

_SCHEMAS = ("json_schema", "schema")
"""Keys of a structural tag that hold the schema of what is between two tags."""


def check(constraint: "StructuredOutputsParams") -> None:
    """Refuses a grammar with two rules of one name, and a schema that refers to itself alone.

    Raises:
        VLLMValidationError: the constraint is such a one; vLLM's server answers with HTTP 400.
    """
    if constraint.grammar:
        _check_rules(constraint.grammar)
    if constraint.json is not None:
        schema = constraint.json
        _check_references(json.loads(schema) if isinstance(schema, str) else schema)
    if constraint.structural_tag:  # what vLLM makes of the parameters of tools
        for part in _parts(json.loads(constraint.structural_tag)):
            for key in _SCHEMAS:
                _check_references(part.get(key))


def _check_rules(grammar: str) -> None:
    names: list[str] = _RULE.findall(grammar)
    for name in names:
        if names.count(name) > 1:
            raise VLLMValidationError(
                f"structured_outputs.grammar: the rule {name!r} is defined {names.count(name)} "
                "times; give its alternatives in one rule, with |",
                parameter="structured_outputs",
            )


def _check_references(schema: Any) -> None:
    """Follows every reference to where something else than a reference is said."""
    done: set[int] = set()
    for part in _parts(schema):
        _follow(schema, part, done, frozenset(), "")


def _follow(schema: Any, part: Any, done: set[int], path: frozenset[int], reference: str) -> None:
    """Follows what a part of the schema demands of the same value.

    Args:
        done: parts that lead to no circle, by identity.
        path: parts that have led to this one.
        reference: the last one that was followed.
    """
    if not isinstance(part, dict) or id(part) in done:
        return
    if id(part) in path:
        raise VLLMValidationError(
            f"structured_outputs: the schema's {reference!r} refers to itself, and no "
            "value satisfies it; a schema may refer to itself within properties or items",
            parameter="structured_outputs",
        )
    path |= {id(part)}
    for member in part["allOf"] if isinstance(part.get("allOf"), list) else ():
        _follow(schema, member, done, path, reference)
    target = part.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        _follow(schema, _at(schema, target), done, path, target)
    done.add(id(part))


def _at(schema: Any, reference: str) -> Any:
    """What a JSON pointer such as `#/$defs/a` names within the schema; None where there is none."""
    for key in unquote(reference[1:]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
            schema = schema[int(key)]
        elif isinstance(schema, dict):
            schema = schema.get(key)
        else:
            return None
    return schema


def _parts(schema: Any) -> Iterator[dict]:
    """Every object in the schema, itself included, but not within values that it names."""
    if isinstance(schema, dict):
        yield schema
        schema = [member for key, member in schema.items() if key not in _VALUES]
    for member in schema if isinstance(schema, list) else ():
        if isinstance(member, dict | list):
            yield from _parts(member)
