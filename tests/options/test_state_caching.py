"""vLLM's mode for the states of cached prefixes."""

import pytest

from vllm_metal.options import state_caching
from vllm_metal.options.state_caching import set_state_caching


@pytest.mark.parametrize(
    ("has_state", "caches", "mode"),
    [(True, True, "align"), (True, False, "none"), (False, True, "none")],
)
def test_states_are_kept_where_prefixes_are_cached(make_config, has_state, caches, mode):
    config = make_config(enable_prefix_caching=caches)
    config.cache_config.mamba_cache_mode = "none" if mode == "align" else "align"
    set_state_caching(config, has_state)
    assert config.cache_config.mamba_cache_mode == mode
    assert config.cache_config.enable_prefix_caching == caches
    assert config.cache_config.mamba_block_size == (16 if mode == "align" else None)


def test_a_prompt_in_one_chunk_has_no_place_for_a_state(make_config, monkeypatch):
    """vLLM's scheduler asserts it for the models that it knows."""
    said: list[str] = []
    monkeypatch.setattr(state_caching.logger, "warning", said.append)
    config = make_config()
    config.scheduler_config.enable_chunked_prefill = False
    set_state_caching(config, has_state=True)
    assert not config.cache_config.enable_prefix_caching
    assert config.cache_config.mamba_cache_mode == "none"
    assert "Prefix caching is off" in said[0] and "--no-enable-chunked-prefill" in said[0]
