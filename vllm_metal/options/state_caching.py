"""vLLM's settings for the prefix cache of a model with recurrent state.

A recurrent state says nothing about the tokens before the last one it has seen. So a prefix is
found again only where the state after its last token was kept. vLLM's mode for this is "align":
its scheduler ends prompt chunks at the ends of blocks and gives a request a new block for its
state from there on, so that the old block keeps what is in it.
"""

from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.metal.platform")


def set_state_caching(vllm_config: "VllmConfig", has_state: bool) -> None:
    """Sets the mode, as vLLM does for the models with recurrent state that it knows.

    Many of mlx-lm's models it takes for a Llama.

    Args:
        vllm_config: the configuration to change.
        has_state: whether the model has recurrent state.
    """
    cache = vllm_config.cache_config
    caches_states = has_state and cache.enable_prefix_caching
    if caches_states and not vllm_config.scheduler_config.enable_chunked_prefill:
        cache.enable_prefix_caching = caches_states = False
        logger.warning(
            "Prefix caching is off: the model has recurrent state, which is kept where a prompt "
            "chunk ends, and there is one chunk only (--no-enable-chunked-prefill)"
        )
    cache.mamba_cache_mode = "align" if caches_states else "none"
    if caches_states:
        cache.mamba_block_size = cache.block_size
