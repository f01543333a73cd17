"""The committed measurements are complete and are read, not typed in."""

import pytest

from vllm_metal.metal_kernel_backend.turboquant import measured_loss
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair


@pytest.mark.parametrize("pair", measured_loss.SHOWN_PAIRS, ids=str)
def test_every_shown_pair_is_measured(pair):
    loss = measured_loss.measured_loss(pair)
    assert 0 < loss.kld < 1
    assert 0.9 < loss.perplexity_ratio < 2
    assert "KLD" in str(loss) and loss.model in str(loss)


def test_shown_pairs_go_from_most_to_fewest_bits():
    bits = [sum(format.bits for format in pair) for pair in measured_loss.SHOWN_PAIRS]
    assert bits == sorted(bits, reverse=True)
    assert len(set(measured_loss.SHOWN_PAIRS)) == len(measured_loss.SHOWN_PAIRS)


def test_a_pair_without_measurement_has_none():
    assert measured_loss.measured_loss(parse_pair("int2/q2_0")) is None


def run(model: str, head_size: int, kld: float) -> dict:
    pairs = {"q8_0/q3_0": {"kld": kld, "perplexity_ratio": 1 + kld}}
    return {"model": model, "head_size": head_size, "pairs": pairs}


RUNS = [
    run("small-Instruct", 64, 0.1),
    run("small-Instruct", 64, 0.2),
    run("other", 128, 0.3),
    run("third", 128, 0.4),
    {"model": "empty", "head_size": 256, "pairs": {}},
]


@pytest.mark.parametrize(
    ("model", "head_size", "kld"),
    [
        ("", None, 0.1),
        ("/models/Small-instruct-4bit/", 128, 0.1),
        ("hub/third", 64, 0.4),
        ("a/another", 128, 0.3),
        ("a/small", 128, 0.3),
        ("other/model", 64, 0.1),
        ("empty", 256, 0.1),
    ],
)
def test_the_nearest_run_is_taken(monkeypatch, model, head_size, kld):
    """Of the same model, else of the same head size, else any; the first of equals."""
    monkeypatch.setattr(measured_loss, "_runs", lambda: RUNS)
    found = measured_loss.measured_loss(parse_pair("q8_0/q3_0"), model, head_size)
    assert found.kld == kld
    assert f"({found.model}, head size {found.head_size})" in str(found)


def test_committed_runs_say_what_they_measured():
    for run in measured_loss._runs():
        assert {"model", "head_size", "text", "date", "machine", "versions"} <= set(run)
