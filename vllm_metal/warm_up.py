"""Small forward passes before the first request: they measure, compile and check.

They run the real model through the real backend, so a model that would fail in its first request
fails at start.
"""

from collections.abc import Callable

import mlx.core as mx

from vllm_metal.attention.decode_graphs import DecodeGraphs
from vllm_metal.attention.metadata import DecodeMetadata, PrefillMetadata
from vllm_metal.attention.model_binding import ModelBinding
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache

WORKSPACE_PROBE_LENGTHS = (32, 96)
"""Prefill lengths at which peak memory is measured."""

Forward = Callable[..., mx.array]
"""`ModelBinding.forward`, or what stands in for it."""

_PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1])
_TOLERANCE = 0.1
"""Largest difference of logits, in standard deviations: far above rounding in any precision, far
below what a wrong position does."""


def measure_prefill_peaks(binding: ModelBinding, kv_cache: KVCache) -> dict[int, int]:
    """Peak temporary bytes of a prefill without context, by query length.

    Args:
        binding: the model, bound to `kv_cache`.
        kv_cache: a small cache with blocks for the longest probe after block 0.

    Raises:
        UserError: MLX's backend lacks an operation of the model in this type.
    """
    block_size = kv_cache.backends[0].block_size
    peaks = {}
    for length in WORKSPACE_PROBE_LENGTHS:
        num_blocks = -(-length // block_size)
        metadata = PrefillMetadata(
            block_table=mx.arange(1, num_blocks + 1)[None],
            slot_mapping=mx.arange(length) + block_size,
            context_len=0,
            query_len=length,
        )
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        try:
            _evaluate(binding.forward, kv_cache, mx.zeros((1, length), mx.int32), metadata)
        except RuntimeError as error:
            raise UserError(
                f"MLX cannot run model type {binding.model_type!r} on this device",
                [f"{error} (another --dtype may do)"],
            ) from error
        peaks[length] = mx.get_peak_memory() - before
    mx.clear_cache()
    return peaks


def takes_batched_offsets(binding: ModelBinding, kv_cache: KVCache) -> bool:
    """Whether a `(2, 1)` decode with an array of offsets gives what two `(1, 1)` decodes give.

    Uses blocks 1 and 2, which no request owns yet; False where there are none.

    Raises:
        UserError: the model's logits are no numbers.
    """
    if kv_cache.num_blocks < 3 or not binding.decodes_batches:
        return False
    alone = []
    for block, prompt in enumerate(_PROMPTS, start=1):
        _prefill(binding, kv_cache, prompt[:-1], block)
        alone.append(_decode(binding.forward, kv_cache, [prompt], [block]))
    expected = mx.concatenate(alone)
    if mx.isnan(expected).any().item():
        raise UserError(
            f"Model type {binding.model_type!r} computes logits that are no numbers",
            ["its weights do not suit --dtype, are damaged, or it uses its cache in a way unseen"],
        )
    try:
        together = _decode(binding.forward, kv_cache, list(_PROMPTS), [1, 2])
    except (TypeError, ValueError):
        return False
    return _agree(together, expected)


def traced_decode(binding: ModelBinding, kv_cache: KVCache) -> DecodeGraphs | None:
    """Decode that replays traces, compiled for one row and for two.

    Follows `takes_batched_offsets`, whose prompts are in blocks 1 and 2. None where the model's
    forward cannot be traced, or gives something else when it is.
    """
    graphs = DecodeGraphs(binding, kv_cache)
    for rows in (1, 2):
        arguments = kv_cache, list(_PROMPTS[:rows]), list(range(1, rows + 1))
        built = _decode(graphs, *arguments)
        try:
            replayed = _decode(graphs, *arguments)
        except (TypeError, ValueError, RuntimeError):
            return None
        if not _agree(replayed, built):
            return None
    return graphs


def _agree(logits: mx.array, expected: mx.array) -> bool:
    difference = mx.abs(logits - expected).max() / mx.std(expected)
    return difference.item() < _TOLERANCE


def _prefill(binding: ModelBinding, kv_cache: KVCache, prompt: list[int], block: int) -> mx.array:
    first_slot = block * kv_cache.backends[0].block_size
    metadata = PrefillMetadata(
        block_table=mx.array([[block]]),
        slot_mapping=mx.arange(len(prompt)) + first_slot,
        context_len=0,
        query_len=len(prompt),
    )
    return _evaluate(binding.forward, kv_cache, mx.array([prompt]), metadata)


def _decode(
    forward: Forward, kv_cache: KVCache, prompts: list[list[int]], blocks: list[int]
) -> mx.array:
    """Logits [B, vocabulary] of the last token of each prompt, each in one block."""
    seq_lens = mx.array([len(prompt) for prompt in prompts])
    positions = seq_lens - 1
    metadata = DecodeMetadata(
        block_table=mx.array(blocks)[:, None],
        seq_lens=seq_lens,
        slot_mapping=mx.array(blocks) * kv_cache.backends[0].block_size + positions,
        offset=positions if len(prompts) > 1 else len(prompts[0]) - 1,
        max_seq_len=max(map(len, prompts)),
    )
    token_ids = mx.array([prompt[-1:] for prompt in prompts])
    return _evaluate(forward, kv_cache, token_ids, metadata)


def _evaluate(
    forward: Forward,
    kv_cache: KVCache,
    token_ids: mx.array,
    metadata: DecodeMetadata | PrefillMetadata,
) -> mx.array:
    logits = forward(token_ids, metadata)[:, -1].astype(mx.float32)
    mx.eval(logits, kv_cache.arrays)
    return logits
