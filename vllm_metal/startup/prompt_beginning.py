"""The tokens that a tokenizer puts before every prompt.

Some models were trained with such a token (BOS) and compute abnormal numbers without it: Gemma 3
270M has a perplexity of 16 on a text that it reads with its BOS, and of 74 without. So whatever
measures a model lets it read texts as a server's prompts are read.
"""

from typing import Protocol

TEXT = "The harbour was quiet."


class Encode(Protocol):
    """A tokenizer's `encode`: text to token ids, with its special tokens unless told otherwise."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


def prompt_beginning(encode: Encode) -> list[int]:
    """What `encode` puts before a text: mostly nothing, or one BOS token."""
    whole = list(encode(TEXT, add_special_tokens=True))
    text = list(encode(TEXT, add_special_tokens=False))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    return []  # the text itself is encoded differently, so that nothing can be told apart
