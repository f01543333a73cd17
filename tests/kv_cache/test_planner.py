"""Arithmetic of the memory plan; no device is asked."""

import pytest

from vllm_metal.kv_cache.capacity import CacheSummary, Capacity
from vllm_metal.kv_cache.groups import AttentionGroup, StateGroup
from vllm_metal.kv_cache.planner import (
    GIB,
    MemoryPlan,
    format_bytes,
    report,
)
from vllm_metal.machine.device import Device

MIB = 1 << 20


def plan(in_use: int = 0, utilization: float = 0.75, requested: int | None = None) -> MemoryPlan:
    device = Device("metal", "Apple M4", memory_limit=16 * GIB, memory_in_use=in_use)
    return MemoryPlan(device, utilization, 3 * GIB, GIB, requested)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (92, "92 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (24 * MIB, "24.00 MiB"),
        (1.5 * GIB, "1.50 GiB"),
        (-2 * GIB, "-2.00 GiB"),
        (0, "0 B"),
    ],
)
def test_bytes_as_people_read_them(size, text):
    assert format_bytes(size) == text


def test_what_is_left_for_pages():
    assert plan().budget == 12 * GIB
    assert plan().page_bytes == 8 * GIB


def test_other_processes_take_what_utilization_leaves_first():
    """What others hold counts only once it exceeds the share that is left to them anyway."""
    assert plan(in_use=2 * GIB).page_bytes == 8 * GIB
    assert plan(in_use=6 * GIB).page_bytes == 6 * GIB


def test_pages_may_not_fit_at_all():
    assert plan(in_use=13 * GIB).page_bytes == -GIB


def test_the_user_may_name_the_bytes_for_pages():
    assert plan(in_use=13 * GIB, requested=5 * MIB).page_bytes == 5 * MIB
    assert plan(requested=MIB).lines() == ["KV cache 1.00 MiB (--kv-cache-memory-bytes)"]


@pytest.mark.parametrize(("in_use", "limited"), [(4 * GIB, False), (4 * GIB + 1, True)])
def test_who_decides_the_budget(in_use, limited):
    assert plan(in_use=in_use).is_limited_by_others == limited


def test_the_sum_term_by_term():
    assert plan().lines() == [
        "memory limit 16.00 GiB x 0.75 (--gpu-memory-utilization)",
        "usable 12.00 GiB",
        "weights 3.00 GiB",
        "workspace 1.00 GiB",
        "left for the KV cache 8.00 GiB",
    ]


def test_memory_of_other_processes_is_shown():
    assert "held by other processes 6.00 GiB" in plan(in_use=6 * GIB).lines()


def rows_of(text: str) -> dict[str, str]:
    return {line[4:17].strip(): line[17:] for line in text.splitlines()[1:]}


def test_the_report_counts_without_the_null_block():
    per_block = 384 * 1024
    summary = CacheSummary(30, 0, per_block / 16, per_block / 16, 12288)
    blocks = Capacity(1025 * per_block + 5, per_block, 16)
    text = report(plan(), ["dense bfloat16"] * 30, summary, blocks, blocks, 4096)
    assert rows_of(text) == {
        "device": "Apple M4 (metal)",
        "memory limit": "16.00 GiB",
        "weights": "3.00 GiB",
        "workspace": "1.00 GiB",
        "KV cache": "384.38 MiB",
        "pages": "30 layers dense bfloat16",
        "per token": "24.00 KiB",
        "blocks": "1,025 of 16 tokens",
        "tokens": "16,384",
        "requests": "4.0 of 4,096 tokens (max_model_len)",
    }


def test_the_report_of_a_compressed_cache_compares_with_a_dense_one():
    """28 layers of 92 bytes a head slot between two dense ones of 256, 3 heads."""
    per_token = 3 * (28 * 92 + 2 * 256)
    summary = CacheSummary(30, 28, per_token, 3 * 30 * 256, 3 * 30 * 128)
    blocks = Capacity(11 * 16 * per_token, 16 * per_token, 16)
    names = ["dense float16", *["turboquant q8_0/q3_0"] * 28, "dense float16"]
    dense = Capacity(blocks.page_bytes, 16 * 3 * 30 * 256, 16)
    rows = rows_of(report(plan(), names, summary, blocks, dense, 32))
    assert rows["pages"] == "2 layers dense float16 + 28 layers turboquant q8_0/q3_0"
    assert rows["compressed"] == "28 of 30 layers"
    assert rows["ratio"].startswith("2.49x ")
    assert rows["bits"].startswith("6.43 per key or value element")
    assert rows["tokens"] == "160"
    assert rows["dense tokens"] == "48 in the same bytes"


def test_the_ratio_is_that_of_the_whole_cache():
    """Compressed layers beside a state as large as ten of their blocks: not their own ratio."""
    groups = AttentionGroup(64, layers=(0,)), StateGroup((0,), 4096)
    dense_groups = AttentionGroup(16, layers=(0,)), StateGroup((0,), 4096)
    blocks = Capacity(100 * MIB, MIB, 64, groups)
    dense = Capacity(100 * MIB, MIB, 16, dense_groups)
    summary = CacheSummary(1, 1, 0.25, 1.0, 1)
    rows = rows_of(report(plan(), ["turboquant"], summary, blocks, dense, 1024))
    assert rows["ratio"].startswith(f"{(64 + 1) / (16 + 1):.2f}x ")
    assert rows["per request"] == "17.00 MiB at max_model_len"


@pytest.mark.parametrize(
    ("match_tokens", "found"),
    [
        (64, "found at multiples of 64 tokens"),
        (1088, "never found: they end at multiples of 1,088 tokens, and max_model_len is 1,024"),
    ],
)
def test_the_report_says_what_a_kept_state_takes(match_tokens, found):
    groups = AttentionGroup(64, layers=(0,)), StateGroup((0,), 64, 2, 2), StateGroup((1,), 64, 2, 2)
    blocks = Capacity(100 * MIB, MIB, 64, groups, match_tokens=match_tokens)
    rows = rows_of(report(plan(), ["dense"], CacheSummary(1, 0, 1, 1, 1), blocks, blocks, 1024))
    assert rows["prefixes"] == found
    assert rows["kept states"] == (
        "2.00 MiB for each prefix, beside its tokens; room for 39 beside one request of "
        "max_model_len"
    )
