"""From the peaks of small forward passes to the workspace; prompt logprobs stay within it."""

import resource
import sys

import mlx.core as mx
import pytest

from tests.serving import Serving
from tests.tiny_models import save_checkpoint
from vllm_metal.attention.backend import ChunkMemory
from vllm_metal.kv_cache import workspace
from vllm_metal.kv_cache.workspace import (
    DECODE_SHARE,
    MOST_SHARED_ROWS,
    ForwardPeaks,
    StepMemory,
    most_decode_rows,
    scored_piece_rows,
    scoring_bytes,
)

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""What `ru_maxrss` counts in."""


@pytest.fixture(autouse=True)
def no_margin(monkeypatch):
    """So that figures are round."""
    monkeypatch.setattr(workspace, "MARGIN", 0)


GRID = [(rows, tokens) for rows in (4, 16) for tokens in (512, 1024)]


def peaks(dense, attention) -> ForwardPeaks:
    """Measured where peaks are these functions of rows, and of rows and tokens."""
    return ForwardPeaks({r: dense(r) for r in (32, 128)}, {rs: attention(*rs) for rs in GRID})


def test_dense_layers_grow_with_the_rows():
    measured = peaks(lambda rows: 1000 + 30 * rows, lambda rows, tokens: 0)
    assert measured.of(2048, 100_000) == 1000 + 30 * 2048


def test_attention_grows_with_rows_tokens_and_their_product():
    measured = peaks(
        lambda rows: 0, lambda rows, tokens: 70 + 5 * rows + 3 * tokens + 2 * rows * tokens
    )
    assert measured.of(600, 7000) == 70 + 5 * 600 + 3 * 7000 + 2 * 600 * 7000
    tiles = ChunkMemory(600, 7000, scored_rows=11)
    assert measured.of_chunk(tiles) == 70 + 5 * 600 + 3 * 7000 + 2 * 11 * 7000


def test_scores_that_small_passes_hide_are_counted():
    measured = peaks(lambda rows: 0, lambda rows, tokens: 3 * tokens)
    assert measured.of_chunk(ChunkMemory(600, 7000, 11, score_bytes=16)) == (
        3 * 7000 + 16 * 11 * 7000
    )


def test_what_follows_has_a_margin(monkeypatch):
    monkeypatch.setattr(workspace, "MARGIN", 0.25)
    assert peaks(lambda rows: 100 * rows, lambda *_: 0).of(1000, 1) == 125_000


def test_the_greater_phase_counts():
    measured = peaks(lambda rows: 100 * rows, lambda rows, tokens: 3 * tokens)
    assert measured.of(1000, 1000) == 100_000
    assert measured.of(1000, 100_000) == 300_000


def test_a_peak_that_falls_does_not_make_larger_ones_negative():
    measured = peaks(lambda rows: 5000 - rows, lambda rows, tokens: 9000 - rows - tokens)
    assert measured.of(2048, 100_000) == 9000 - 4 - 512
    assert measured.of(1, 1) == 9000 - 4 - 512


@pytest.mark.parametrize(("rows", "tokens"), [((1,), (1,)), ((1,), (8, 16)), ((2, 8), (5,))])
def test_a_server_too_small_for_two_measurements(rows, tokens):
    grid = {(r, s): 10 * r + s for r in rows for s in tokens}
    measured = ForwardPeaks({r: 10 * r for r in rows}, grid)
    assert measured.of(max(rows), max(tokens)) == max(grid.values())


def steps(**changes) -> StepMemory:
    """A prefill of 10 bytes a token; decode of 2 bytes a gathered token and 100 a request."""
    return StepMemory(
        prefill=peaks(lambda rows: 10 * rows, lambda rows, tokens: tokens),
        decode=peaks(lambda rows: 0, lambda rows, tokens: 100 * rows + 2 * rows * tokens),
        **(
            {"chunks": {ChunkMemory(512, 1000, 512)}, "max_requests": 8, "max_tokens": 1000}
            | changes
        ),
    )


def test_the_largest_chunk_decides_where_little_is_gathered():
    assert steps().workspace(page_bytes=0, num_tokens=0) == 5120
    chunks = {ChunkMemory(512, 1000, 512), ChunkMemory(512, 90_000, 1)}
    assert steps(chunks=chunks).workspace(page_bytes=0, num_tokens=0) == 90_000


def test_all_requests_are_gathered_at_once_where_memory_allows():
    """3200 tokens and an eighth: more than the cache holds is never gathered."""
    share = 1 << 20
    assert steps().workspace(share * DECODE_SHARE, num_tokens=3200) == 8 * 100 + 2 * 3600
    everything = steps().workspace(share * DECODE_SHARE, num_tokens=10**9)
    assert everything == 8 * 100 + 2 * 8 * 1000


def test_gathering_takes_a_share_of_the_memory_at_most():
    assert steps().workspace(6000 * DECODE_SHARE, num_tokens=3200) == 6000
    assert steps().workspace(4000 * DECODE_SHARE, num_tokens=3200) == 5120


def test_one_request_is_gathered_whatever_it_takes():
    long = steps(max_tokens=50_000, chunks={ChunkMemory(512, 50_000, 512)})
    assert long.workspace(page_bytes=0, num_tokens=0) == 100 + 2 * 50_000


def test_two_decode_steps_at_a_time_take_twice_the_memory():
    two = steps(decodes_at_once=2)
    assert two.workspace((1 << 20) * DECODE_SHARE, num_tokens=3200) == 2 * (8 * 100 + 2 * 3600)
    long = steps(max_tokens=50_000, decodes_at_once=2)
    assert long.workspace(page_bytes=0, num_tokens=0) == 2 * (100 + 2 * 50_000)
    assert two.decode_bytes(two.decode_tokens(9000)) <= 9000


@pytest.mark.parametrize("workspace", [2900, 3300, 9000, 16_799, 16_800])
def test_decode_is_cut_to_fit(workspace):
    plan = steps()
    tokens = plan.decode_tokens(workspace)
    assert plan.decode_bytes(tokens) <= workspace
    assert tokens == 8000 or plan.decode_bytes(tokens + 1) > workspace


def test_decode_is_never_cut_below_one_request():
    assert steps().decode_tokens(0) == 1000


def test_prompt_logprobs_may_decide():
    assert steps(scoring=9000).workspace(page_bytes=0, num_tokens=0) == 9000
    few, many = (scoring_bytes(rows, 100_000, 64) for rows in (10, 2000))
    assert scored_piece_rows(100_000) == 83 and scored_piece_rows(96) == 256
    assert few == 4 * (4 * 10 * 100_000 + 10 * 64)
    assert many == 4 * (4 * 83 * 100_000 + 2000 * 64)


@pytest.mark.parametrize(
    ("vocabulary", "length"),
    [(40_000, 500), pytest.param(100_000, 2000, marks=pytest.mark.nightly)],
)
def test_the_workspace_is_enough_for_prompt_logprobs(make_config, tmp_path, vocabulary, length):
    """The logits of all rows at once take 80 and 800 MB, and twice that with what is made of them.

    Pieces of them take 150 MB at most, whatever the length of the prompt.
    """
    positions = {"max_position_embeddings": 4096}
    config = make_config(
        model=str(save_checkpoint(tmp_path, vocab_size=vocabulary, **positions)),
        max_model_len=length + 12,
        max_num_batched_tokens=length + 12,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
    )
    serving = Serving(config)
    prompt = list(range(100)) * (length // 100)
    serving.generate([prompt[:20]], max_tokens=1, prompt_logprobs=1)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, process_before = mx.get_active_memory(), _peak_of_process()
    serving.generate([prompt], max_tokens=1, prompt_logprobs=1)
    peak, of_process = mx.get_peak_memory() - before, _peak_of_process() - process_before
    plan = serving.worker.plan.workspace
    print(f"MLX's peak {peak >> 20} MiB, plan {plan >> 20}; the process grew {of_process >> 20}")
    assert peak < plan < 150e6
    assert of_process < 2 * plan


def _peak_of_process() -> int:
    """Most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def test_rows_of_drafts_are_rows_of_the_step_up_to_a_bound():
    assert most_decode_rows(max_requests=8, num_drafts=0) == 8
    assert most_decode_rows(max_requests=8, num_drafts=4) == 40
    assert most_decode_rows(max_requests=200, num_drafts=4) == MOST_SHARED_ROWS
    assert most_decode_rows(max_requests=1000, num_drafts=4) == 1000
