"""Haystacks hold every needle at its depth and have the length asked for."""

import pytest

from vllm_metal.evaluation import needle


def encode(text):
    return [ord(c) for c in text]


def test_haystack_holds_the_needles_in_order():
    hay = [ord("x")] * 5000
    tokens = needle._haystack(hay, 1000, encode)
    text = "".join(map(chr, tokens))
    assert len(tokens) == 1000
    places = [text.index(f"{beginning} {end}.") for beginning, end in needle.NEEDLES]
    assert places == sorted(places)
    assert places[0] < 100 and places[-1] > 850


def test_an_answer_with_the_number_is_found(monkeypatch):
    class Sequence:
        def __init__(self, binding, backends, max_tokens):
            pass

        def prefill(self, tokens):
            return iter(())

        def greedy(self, question, new_tokens):
            return encode(" 604." if "Lindqvist" in "".join(map(chr, question)) else " no, 604")

    monkeypatch.setattr(needle, "PagedSequence", Sequence)
    found = needle.find_needles(
        None, None, [1] * 1000, encode, lambda t: "".join(map(chr, t)), [500]
    )
    assert [n.found for n in found] == [False, False, True, *5 * [False]]


def test_a_haystack_too_short_for_its_needles():
    with pytest.raises(ValueError, match="200 tokens do not hold"):
        needle._haystack([1] * 1000, 200, encode)


def test_a_text_shorter_than_the_haystack():
    """Slices past its end are empty, and the last needles would stand close together."""
    sentences = sum(len(f"\n{beginning} {end}.\n") for beginning, end in needle.NEEDLES)
    needed = 1000 - sentences
    assert len(needle._haystack([1] * needed, 1000, encode)) == 1000
    with pytest.raises(ValueError, match=f"{needed - 1} tokens of hay; {needed} are needed"):
        needle._haystack([1] * (needed - 1), 1000, encode)
