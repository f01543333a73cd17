"""Needles in a haystack: is a fact in a long context still found through compressed pages?

Each haystack holds several needles at different depths. It is read once, then every question is
asked on top of it, so that the question and the answer read the haystack from the pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.evaluation.sequence import PagedSequence

HAYSTACKS = (1000, 2000, 3000, 4000)
"""Context lengths, tokens."""
NEEDLES = (
    ("red", "4178"),
    ("blue", "9325"),
    ("green", "6042"),
    ("yellow", "7591"),
)
"""The needles of each haystack: (colour, number)."""
ANSWER_TOKENS = 8

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Needle:
    """One question and whether it was answered."""

    context: int
    depth: float
    found: bool


def find_needles(
    binding: ModelBinding,
    backends: Sequence[AttentionBackend],
    hay: Sequence[int],
    encode: Encode,
    decode: Decode,
    haystacks: Sequence[int] = HAYSTACKS,
) -> list[Needle]:
    """Asks for every needle of every haystack.

    Args:
        binding: the model.
        backends: one for each layer.
        hay: token ids of a text at least as long as the longest haystack.
        encode: text to token ids, without special tokens.
        decode: token ids to text.
        haystacks: context lengths.
    """
    needles = []
    for length in haystacks:
        sequence = PagedSequence(binding, backends, length + 128)
        for _ in sequence.prefill(_haystack(hay, length, encode)):
            pass
        for i, (colour, number) in enumerate(NEEDLES):
            question = encode(
                f"\n\nQuestion: What is the secret number of the {colour} box?\n"
                f"Answer: The secret number of the {colour} box is"
            )
            answer = decode(sequence.greedy(question, ANSWER_TOKENS))
            needles.append(Needle(length, _depth(i), number in answer.replace(" ", "")))
    return needles


def _depth(i: int) -> float:
    return (i + 0.5) / len(NEEDLES)


def _haystack(hay: Sequence[int], length: int, encode: Encode) -> list[int]:
    """`length` tokens of hay with the needles at even depths."""
    needles = [
        encode(f"\nThe secret number of the {colour} box is {number}.\n")
        for colour, number in NEEDLES
    ]
    room = length - sum(map(len, needles))
    tokens: list[int] = []
    start = 0
    for i, needle in enumerate(needles):
        end = int(_depth(i) * room)
        tokens += [*hay[start:end], *needle]
        start = end
    return tokens + list(hay[start:room])
