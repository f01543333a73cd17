"""The table and the plot."""

import pytest

from vllm_metal.benchmark.report import plot, table


def timed(requests: int, context: int, step: float) -> dict:
    return {
        "requests": requests,
        "context": context,
        "first_token_seconds": 1.5,
        "step_milliseconds": step,
        "tokens_per_second": 1e3 * requests / step,
    }


FIGURES = {
    "mlx-lm": [{"cache_tokens": None}, timed(1, 1024, 10.0), timed(4, 1024, 20.0)],
    "dense": [
        {"cache_tokens": 120_000},
        timed(1, 1024, 12.5),
        {"requests": 4, "context": 1024, "skipped": "would take about 90 s, and 2 s are left"},
    ],
    "q8_0/q3_0": [{"failed": "MemoryError: no"}],
}


def test_table():
    lines = table(FIGURES).splitlines()
    assert lines[:3] == [
        "mlx-lm      KV cache grows as it is filled",
        "dense       KV cache holds 120,000 tokens",
        "q8_0/q3_0   did not run: MemoryError: no",
    ]
    assert [line.split() for line in lines[5:]] == [
        "1 x 1,024 mlx-lm 1.500 s 10.00 ms 100.0 1.00x".split(),
        "dense 1.500 s 12.50 ms 80.0 1.25x".split(),
        "4 x 1,024 mlx-lm 1.500 s 20.00 ms 200.0 1.00x".split(),
        "dense not run: would take about 90 s, and 2 s are left".split(),
    ]


def test_without_mlx_lm_nothing_is_compared():
    assert "x 1," in (text := table({"dense": FIGURES["dense"]}))
    assert "1.25x" not in text and "1.00x" not in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot(FIGURES, "model", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
