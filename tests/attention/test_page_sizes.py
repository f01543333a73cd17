"""Pages of one size for layers of different kinds."""

import pytest

from vllm_metal.attention.page_sizes import (
    PageSize,
    StateCaching,
    TokenBytes,
    match_unit,
    page_sizes,
)

WINDOW = 128


def test_layers_of_one_kind_keep_the_block_size():
    """Whatever their sizes: vLLM plans them as one group."""
    layers = [TokenBytes(512), TokenBytes(92), TokenBytes(512)]
    assert page_sizes(layers, [], 16) == [PageSize(16, 16 * n) for n in (512, 92, 512)]
    windows = [TokenBytes(size, WINDOW) for size in (512, 92)]
    assert page_sizes(windows, [], 16) == [PageSize(16, 16 * 512), PageSize(16, 16 * 92)]


def test_equal_layers_with_and_without_a_window_need_no_padding():
    layers = [TokenBytes(512), TokenBytes(512, WINDOW)]
    assert page_sizes(layers, [], 16) == [PageSize(16, 8192)] * 2


def test_a_smaller_layer_gets_more_tokens():
    dense, compressed = page_sizes([TokenBytes(4096), TokenBytes(1480, WINDOW)], [], 16)
    assert dense.page_bytes == compressed.page_bytes
    assert compressed.block_size > 2 * dense.block_size


@pytest.mark.parametrize("state", [1, 5632, 1_000_000, 2_150_400])
@pytest.mark.parametrize("sizes", [(2048,), (736,), (4096, 1480), (2832, 5696)], ids=str)
def test_pages_hold_every_state_and_waste_little(sizes, state):
    layers = [TokenBytes(size) for size in sizes]
    pages = page_sizes(layers, [state, state // 2], 16)
    [page_bytes] = {page.page_bytes for page in pages}
    assert page_bytes >= state
    assert page_bytes % 16 == 0
    for layer, page in zip(layers, pages, strict=True):
        used = page.block_size * layer.bytes_per_token
        assert page.block_size % 8 == 0 and page.block_size >= 16
        assert 0 <= page_bytes - used < 8 * layer.bytes_per_token
    if len(sizes) == 1:
        assert page_bytes == pages[0].block_size * sizes[0]


def test_without_attention_there_is_nothing_to_size():
    assert page_sizes([], [4096], 16) == []


STEP = StateCaching(chunk_tokens=2048, step_tokens=2048, max_requests=256)
MIXES = [(2048,), (736,), (4096, 1480), (4096, 4096, 1480, 1480, 1480), (2832, 5696), (512, 184)]
STATES = [64, 5632, 1_000_000, 2_150_400, 6_000_000, 25_000_000]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("sizes", MIXES, ids=str)
def test_blocks_beside_kept_states_are_multiples_of_the_smallest(sizes, state):
    """Whose ends are where vLLM ends prompt chunks, and where a prefix may be found."""
    pages = page_sizes([TokenBytes(size) for size in sizes], [state, state // 2], 16, STEP)
    [page_bytes] = {page.page_bytes for page in pages}
    blocks = [page.block_size for page in pages]
    smallest = min(blocks)
    assert page_bytes >= state
    assert all(block % smallest == 0 for block in blocks)
    assert not STEP.starves(smallest)
    unit = match_unit(smallest)
    assert unit is not None or smallest < 64 and len(set(blocks)) == 1
    assert unit is None or smallest % unit == 0 and smallest % 8 == 0
    for page, size in zip(pages, sizes, strict=True):
        assert page.block_size * size <= page_bytes < (page.block_size + smallest) * size + size


def test_large_blocks_are_divided_by_64_tokens():
    assert [match_unit(size) for size in (16, 56, 64, 128, 136, 1088, 2112)] == [
        *(None, None, 8, 16, 8, 64, 64)
    ]


def test_a_compressed_layer_has_a_multiple_of_the_dense_layers_tokens():
    dense, compressed = page_sizes([TokenBytes(4096), TokenBytes(1480)], [4 << 20], 16, STEP)
    assert dense.block_size % 64 == 0 and compressed.block_size == 3 * dense.block_size


def test_windows_beside_kept_states_have_the_same_blocks():
    """vLLM finds prefixes at the ends of all their blocks alone: unequal ones would never meet."""
    layers = [TokenBytes(4096), TokenBytes(1480), TokenBytes(1480, WINDOW)]
    pages = page_sizes(layers, [1_000_000], 16, STEP)
    assert len(set(pages)) == 1 and pages[0].block_size == 248


def test_blocks_are_multiples_of_the_users_unit():
    step = StateCaching(2048, 2048, 256, match_unit=48)
    [page] = page_sizes([TokenBytes(2048)], [1_000_000], 16, step)
    assert page.block_size == 528


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(1000, 1024), (1792, 1792), (1793, 2112), (2048, 2112), (2049, 2112)],
)
def test_a_block_is_not_just_under_the_tokens_of_a_step(at_least, expected):
    """While 256 requests decode, 1,792 of 2,048 tokens are left for a new prompt."""
    assert STEP.block_size(at_least, 64) == expected


def test_a_shorter_chunk_is_what_a_block_has_to_fit():
    """Longer blocks are read in several chunks; then no request waits for a whole one."""
    step = StateCaching(chunk_tokens=512, step_tokens=2048, max_requests=256)
    assert not step.starves(2048) and not step.starves(512)
