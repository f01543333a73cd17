"""Needles in a haystack: is a fact in a long context still found through compressed pages?

Each haystack holds several sentences at different depths. It is read once; then the beginning of
each sentence is put after it, and the model has to go on with its end, which it reads from the
pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_metal.attention.backend import AttentionBackend
from vllm_metal.evaluation.sequence import PagedSequence
from vllm_metal.model.model_binding import ModelBinding

HAYSTACKS = (1000, 2000, 3000, 4000)
"""Context lengths, tokens."""
NEEDLES = (
    ("The password of the old library is", "4178"),
    ("The night train to Vienna leaves at platform", "93"),
    ("Professor Lindqvist lives in room", "604"),
    ("The treasure is buried under the", "oak"),
    ("The name of the captain's parrot is", "Hector"),
    ("The best soup in the village is made of", "pumpkin"),
    ("The winning horse of the spring race was", "Thunder"),
    ("The museum keeps the crown in vault number", "27"),
)
"""The sentences of each haystack: (beginning, end). The beginning is the question."""
ANSWER_TOKENS = 5

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
    haystacks: Sequence[int],
    beginning: Sequence[int] = (),
) -> list[Needle]:
    """Asks for every needle of every haystack.

    Args:
        binding: the model.
        backends: one for each layer.
        hay: token ids of a text at least as long as the longest haystack.
        encode: text to token ids, without special tokens.
        decode: token ids to text.
        haystacks: context lengths.
        beginning: tokens before the text, as before the prompts of a server.

    Raises:
        ValueError: a haystack does not hold the sentences, or the text is shorter than it.
    """
    needles = []
    questions = [encode(f"\n{question}") for question, _ in NEEDLES]
    room = max(map(len, questions)) + ANSWER_TOKENS
    for length in haystacks:
        haystack = [*beginning, *_haystack(hay, length - len(beginning), encode)]
        sequence = PagedSequence(binding, backends, len(haystack) + room)
        for _ in sequence.prefill(haystack):
            pass
        for i, (_, end) in enumerate(NEEDLES):
            answer = decode(sequence.greedy(questions[i], ANSWER_TOKENS))
            needles.append(Needle(length, _depth(i), answer.strip().startswith(end)))
    return needles


def _depth(i: int) -> float:
    return (i + 0.5) / len(NEEDLES)


def _haystack(hay: Sequence[int], length: int, encode: Encode) -> list[int]:
    """`length` tokens of hay with the needles at even depths."""
    needles = [encode(f"\n{beginning} {end}.\n") for beginning, end in NEEDLES]
    room = length - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"{length} tokens do not hold the sentences, which take {length - room}")
    if len(hay) < room:
        raise ValueError(f"{len(hay)} tokens of hay; {room} are needed")
    tokens: list[int] = []
    start = 0
    for i, needle in enumerate(needles):
        end = int(_depth(i) * room)
        tokens += [*hay[start:end], *needle]
        start = end
    return tokens + list(hay[start:room])
