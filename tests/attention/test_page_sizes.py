"""Pages of one size for layers of different kinds."""

import pytest

from vllm_metal.attention.page_sizes import PageSize, TokenBytes, page_sizes

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
