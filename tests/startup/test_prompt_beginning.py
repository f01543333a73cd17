"""What stands before a prompt is told apart from the prompt."""

import pytest

from vllm_metal.startup.prompt_beginning import prompt_beginning


def tokenizer(before: list[int], after: list[int]):
    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokens = [100 + ord(character) for character in text]
        return [*before, *tokens, *after] if add_special_tokens else tokens

    return encode


@pytest.mark.parametrize("before", [[], [2], [7, 8]])
@pytest.mark.parametrize("after", [[], [3]])
def test_what_stands_before_the_text(before, after):
    assert prompt_beginning(tokenizer(before, after)) == before


def test_a_text_that_is_encoded_differently_has_none():
    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1, 2, 3] if add_special_tokens else [4, 5]

    assert prompt_beginning(encode) == []
