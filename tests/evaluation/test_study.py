"""The study: what it hands to its parts, and what it refuses."""

import pytest

from tests.tiny_models import VOCABULARY, tiny_model
from vllm_metal.errors import UserError
from vllm_metal.evaluation import study
from vllm_metal.evaluation.study import Study, measure
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.model_binding import ModelBinding


def encode(text: str) -> list[int]:
    return [ord(character) % VOCABULARY for character in text]


def run(study: Study, text: str = "the quick brown fox " * 40) -> dict:
    told: list[str] = []
    binding = ModelBinding(tiny_model("qwen3"))
    figures = measure(study, binding, encode(text), encode, lambda _: "", told.append)
    assert told
    return figures


def test_every_candidate_has_every_figure():
    pairs = [parse_pair("q8_0/q8_0"), parse_pair("q3_0/q2_0")]
    study = Study(pairs, [(8, 3)], 2, 40, 60, haystacks=(600,))
    figures = run(study)
    assert figures["dense_perplexity"] > 1
    assert list(figures["pairs"]) == ["q8_0/q8_0", "q3_0/q2_0", "block-affine 8/3"]
    for row in figures["pairs"].values():
        assert row["kld"] > 0 and row["long_window_kld"] > 0 and row["attention_error"] > 0
        assert (row["needles"], row["needles_found_dense"]) == (8, 0)
    fine, coarse, _ = figures["pairs"].values()
    assert fine["bits_per_element"] == 8 + 16 / 32  # one float16 scale for 32 elements
    assert all(fine[name] < coarse[name] for name in ("kld", "long_window_kld", "attention_error"))


def test_a_text_shorter_than_the_long_window():
    with pytest.raises(UserError, match="800 tokens; needed: 900 for the long window"):
        run(Study([parse_pair("q8_0/q8_0")], windows=1, window_tokens=40, long_window_tokens=900))


def test_a_text_shorter_than_the_longest_haystack():
    study = Study([parse_pair("q8_0/q8_0")], windows=1, window_tokens=40, haystacks=(600, 801, 700))
    with pytest.raises(UserError, match="800 tokens; needed: 801 for the needle test"):
        run(study)


def test_a_text_is_as_long_as_every_part_needs():
    study = Study([], windows=3, window_tokens=30, long_window_tokens=95, haystacks=(1, 93))
    study.require(95)
    with pytest.raises(UserError, match="94 tokens; needed: 95 for the long window"):
        study.require(94)
    with pytest.raises(UserError) as error:
        study.require(0)
    assert error.value.summary == (
        "The text has 0 tokens; needed: 90 for 3 windows of 30, 95 for the long window, "
        "93 for the needle test"
    )


def test_every_text_begins_as_a_prompt_does(monkeypatch):
    """Windows, the long one, haystacks and the rows of the calibration; none is longer for it."""
    read: list[list[int]] = []
    compared, calibrated, searched = study.compare, study.calibrate, study.find_needles

    def compare(binding, dense, candidates, windows, progress):
        read.extend(map(list, windows))
        return compared(binding, dense, candidates, windows, progress)

    def calibrate(collect, beginning, text, max_model_len):
        read.append([*beginning])
        return calibrated(collect, beginning, text, max_model_len)

    def find_needles(*arguments):
        read.append([*arguments[-1]])
        return searched(*arguments)

    for replacement in (compare, calibrate, find_needles):
        monkeypatch.setattr(study, replacement.__name__, replacement)
    text = encode("the quick brown fox " * 40)
    binding = ModelBinding(tiny_model("qwen3"))
    plan = Study([parse_pair("q8_0/q8_0")], (), 2, 40, 60, haystacks=(600,))
    measure(plan, binding, text, encode, lambda _: "", lambda _: None, [91, 92])
    assert all(tokens[:2] == [91, 92] for tokens in read)
    assert sorted(map(len, read)) == [2, 2, 2, 2, 40, 40, 60]
